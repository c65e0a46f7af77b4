// The operations on CPU, each in one pass: see kernels/cpp, which builds, loads and checks this.
//
// Every result is bit for bit that of the torch implementation beside each operation, in float32:
//   - a product adds its terms in order, with fused multiply-adds, as MKL does; lanes of a vector
//     are rows, keys or channels, never terms of one sum;
//   - a sum over a row keeps torch's order: 4 vectors of 8 lanes, then lane by lane (`row_sum`);
//   - exp, log and tanh are MKL's, which torch calls too;
//   - elsewhere a multiplication and an addition stay two roundings (-ffp-contract=off).
// bfloat16 is widened on loading and rounded to nearest even on storing; all else is float32.
//
// Work is cut into tasks whose results do not depend on who runs them. Inputs were checked by the
// caller; nothing here allocates but scratch that each thread keeps.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

extern "C" {  // MKL's vector mathematics: n numbers, `mode` its accuracy
void vmsExp(int n, const float *x, float *y, long long mode);
void vmsLn(int n, const float *x, float *y, long long mode);
void vmsTanh(int n, const float *x, float *y, long long mode);
int MKL_Set_Num_Threads_Local(int threads);  // returns what it was; 0: as for all threads
}

namespace {

constexpr long long HIGH_ACCURACY = 0x102;  // what torch asks for
constexpr float INF = std::numeric_limits<float>::infinity();

#ifdef __AVX512F__
constexpr int LANES = 16;
constexpr int SCORE_TILE = 24;  // accumulators of the product of queries and keys
constexpr int MAX_VECTORS = 6;  // vectors of query rows taken together
inline __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512 splat(float x) { return _mm512_set1_ps(x); }
#else
constexpr int LANES = 8;
constexpr int SCORE_TILE = 12;
constexpr int MAX_VECTORS = 3;
inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256 splat(float x) { return _mm256_set1_ps(x); }
#endif
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef float vec8 __attribute__((vector_size(32)));
#ifdef __AVX512F__
constexpr ivec LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
constexpr ivec LANE = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

// a0 b0 a1 b1 ...: the first and the second half of it.
inline void interleave(vec a, vec b, vec &low, vec &high) {
#ifdef __AVX512F__
    const ivec first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    low = _mm512_permutex2var_ps(a, (__m512i)first, b);
    high = _mm512_permutex2var_ps(a, (__m512i)(first + 8), b);
#else
    const vec even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
    low = _mm256_permute2f128_ps(even, odd, 0x20);
    high = _mm256_permute2f128_ps(even, odd, 0x31);
#endif
}
// Row i of x becomes its column i.
inline void transpose(vec (&x)[LANES]) {
    for (int round = 1; round < LANES; round *= 2) {
        vec y[LANES];
        for (int i = 0; i < LANES / 2; i++) interleave(x[i], x[i + LANES / 2], y[2 * i], y[2 * i + 1]);
        for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
}

struct bf16 {
    uint16_t bits;
};

template <class V, class T>
inline V read(const T *p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline vec load(const float *p) { return read<vec>(p); }
inline void store(float *p, vec v) { std::memcpy(p, &v, sizeof v); }
inline void store_first(float *p, vec v, int n) {
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(p, (1 << n) - 1, v);
#else
    _mm256_maskstore_ps(p, (__m256i)(LANE < n), v);
#endif
}
inline vec load(const bf16 *p) {
#ifdef __AVX512F__
    const ivec bits = (ivec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#else
    const ivec bits = (ivec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
#endif
    return (vec)(bits << 16);
}
inline void store(bf16 *p, vec v) {
    const ivec bits = (ivec)v;
    ivec upper = (ivec)((uvec)(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    upper = v == v ? upper : ivec{} + 0x7FC0;
#ifdef __AVX512F__
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)upper));
#else
    const __m256i packed = _mm256_packus_epi32((__m256i)upper, (__m256i)upper);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
#endif
}
inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    return read<float>(&bits);
}
inline void narrow(float x, float *p) { *p = x; }
inline void narrow(float x, bf16 *p) {
    uint32_t bits = read<uint32_t>(&x);
    p->bits = x == x ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : 0x7FC0;
}

inline float largest(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps(v);
#else
    float most = v[0];
    for (int lane = 1; lane < LANES; lane++) most = std::max(most, v[lane]);
    return most;
#endif
}

template <class T>
inline void widen_row(const T *x, float *y, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, load(x + i));
    for (; i < n; i++) y[i] = widen(x[i]);
}
// Scratch that a thread keeps: at least n elements of any content, from the start of a cache line on,
// or every vector would lie in two of them.
template <class T>
inline T *room(std::vector<T> &kept, int64_t n) {
    constexpr int64_t LINE = 64;
    if ((int64_t)kept.size() < n + LINE) kept.resize(n + LINE);
    return (T *)(((uintptr_t)kept.data() + LINE - 1) / LINE * LINE);
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
void lay(F row, int64_t n, int64_t k, float *to, int64_t stride) {
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        vec block[LANES];
        for (int r = 0; r < LANES; r++) block[r] = r < n ? load(row(r) + i) : vec{};
        transpose(block);
        for (int j = 0; j < LANES; j++) store_first(to + (i + j) * stride, block[j], n);
    }
    for (; i < k; i++)
        for (int64_t r = 0; r < n; r++) to[i * stride + r] = widen(row(r)[i]);
}
template <class T>
inline void narrow_row(const float *x, T *y, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, load(x + i));
    for (; i < n; i++) narrow(x[i], y + i);
}

// While it lives, MKL stays in the thread that calls it: from 200 numbers on, waking others takes it
// ten times as long as the numbers do.
struct OneThread {
    int before = MKL_Set_Num_Threads_Local(1);
    ~OneThread() { MKL_Set_Num_Threads_Local(before); }
};

// Runs block(first, last) for all blocks of `grain` numbers of [0, n), on `threads` threads.
template <class F>
void parallel_blocks(int64_t n, int64_t grain, int threads, F block) {
    const auto run = [&](int64_t i) { block(i * grain, std::min(n, (i + 1) * grain)); };
    const int64_t blocks = (n + grain - 1) / grain;
    if (threads == 1 || blocks <= 1) {
        OneThread here;
        for (int64_t i = 0; i < blocks; i++) run(i);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        OneThread here;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < blocks; i++) run(i);
    }
}
// Runs task(i) for i in [0, n) on `threads` threads, `grain` at a time.
template <class F>
void parallel(int64_t n, int64_t grain, int threads, F task) {
    parallel_blocks(n, grain, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) task(i);
    });
}

// torch's sum of a contiguous row: four columns of 8-lane vectors, each a cascade over 4 levels,
// then the columns, the vectors left over, the elements left over, and the lanes, in this order.
// `squared`: of their squares.
template <bool squared = false>
float row_sum(const float *x, int64_t n) {
    const auto at = [x](int64_t i) {
        const vec8 v = read<vec8>(x + i);
        return squared ? v * v : v;
    };
    const int64_t vectors = n / 8, quads = vectors / 4;
    int power = 4;
    if (quads > 1) power = std::max(4, (int)(64 - __builtin_clzll(quads - 1)) / 4);
    const int64_t step = (int64_t)1 << power, mask = step - 1;
    vec8 sums[4][4] = {};
    int64_t i = 0;
    while (i + step <= quads) {
        for (int64_t j = 0; j < step; j++, i++)
            for (int k = 0; k < 4; k++) sums[0][k] += at((4 * i + k) * 8);
        for (int level = 1; level < 4; level++) {
            for (int k = 0; k < 4; k++) {
                sums[level][k] += sums[level - 1][k];
                sums[level - 1][k] = vec8{};
            }
            if (i & (mask << (level * power))) break;
        }
    }
    for (; i < quads; i++)
        for (int k = 0; k < 4; k++) sums[0][k] += at((4 * i + k) * 8);
    for (int level = 1; level < 4; level++)
        for (int k = 0; k < 4; k++) sums[0][k] += sums[level][k];
    for (int64_t v = quads * 4; v < vectors; v++) sums[0][0] += at(v * 8);
    for (int k = 1; k < 4; k++) sums[0][0] += sums[0][k];
    float total = 0;
    for (int64_t j = vectors * 8; j < n; j++) total += squared ? x[j] * x[j] : x[j];
    for (int lane = 0; lane < 8; lane++) total += sums[0][0][lane];
    return total;
}

// -- norm, rope, activation, cache -------------------------------------------------------------

// y = norm(x), or with a residual `total` = x + residual and y = norm(total). w: the weights as
// float32.
template <class T>
void rms_norm_row(const T *x, const T *residual, const float *w, T *y, T *total, int64_t size,
                  float eps, bool plus_one) {
    thread_local std::vector<float> kept;
    int64_t i = 0;
    if (residual) {
        for (; i + LANES <= size; i += LANES) store(total + i, load(x + i) + load(residual + i));
        for (; i < size; i++) narrow(widen(x[i]) + widen(residual[i]), total + i);
        x = total;
    }
    const float *s = widened(x, size, kept), one = plus_one;
    const float rstd = 1 / std::sqrt(row_sum<true>(s, size) / size + eps);
    for (i = 0; i + LANES <= size; i += LANES) {
        const vec factor = plus_one ? load(w + i) + splat(one) : load(w + i);
        store(y + i, load(s + i) * splat(rstd) * factor);
    }
    for (; i < size; i++) narrow(s[i] * rstd * (plus_one ? w[i] + one : w[i]), y + i);
}

template <class T>
void rms_norm(const T *x, int64_t x_t, int64_t x_a, const T *residual, const T *weight, T *y,
              T *total, int64_t rows, int64_t inner, int64_t size, float eps, int64_t plus_one,
              int threads) {
    std::vector<float> wide;
    const float *w = widened(weight, size, wide);
    parallel(rows, std::max<int64_t>(1, 2048 / size), threads, [&](int64_t row) {
        const int64_t at = row * size;
        rms_norm_row(x + row / inner * x_t + row % inner * x_a, residual ? residual + at : nullptr,
                     w, y + at, total + at, size, eps, plus_one);
    });
}

// Turns a head of 2 * half channels; x and y may be the same.
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

template <class T>
void rope(const T *x, int64_t x_t, int64_t x_h, const float *cos, const float *sin, T *y,
          int64_t tokens, int64_t heads, int64_t half, int threads) {
    parallel(tokens, std::max<int64_t>(1, 4096 / (heads * half)), threads, [&](int64_t t) {
        for (int64_t h = 0; h < heads; h++)
            rope_head(x + t * x_t + h * x_h, cos + t * half, sin + t * half,
                      y + (t * heads + h) * 2 * half, half);
    });
}

// gate := act(gate) * up, for n numbers; `room` holds as many.
inline void activate(float *gate, const float *up, float *room, int64_t n, bool gelu) {
    if (gelu) {
        const float slope = 0.79788456080286535588;  // sqrt(2 / pi)
        for (int64_t i = 0; i < n; i++) {
            const float z = gate[i] * gate[i] * 0.044715f + 1;
            room[i] = z * gate[i] * slope;
        }
        vmsTanh(n, room, room, HIGH_ACCURACY);
        for (int64_t i = 0; i < n; i++) gate[i] = (room[i] + 1) * gate[i] * 0.5f * up[i];
    } else {
        for (int64_t i = 0; i < n; i++) room[i] = -gate[i];
        vmsExp(n, room, room, HIGH_ACCURACY);
        for (int64_t i = 0; i < n; i++) gate[i] = gate[i] / (room[i] + 1) * up[i];
    }
}

template <class T>
void gated_act(const T *gate_up, int64_t stride, T *y, int64_t tokens, int64_t size, int gelu,
               int threads) {
    constexpr int64_t PIECE = 512;
    const int64_t pieces = (size + PIECE - 1) / PIECE;
    parallel(tokens * pieces, 8, threads, [&](int64_t task) {
        const int64_t t = task / pieces, first = task % pieces * PIECE;
        const int64_t n = std::min(PIECE, size - first);
        float gate[PIECE], up[PIECE], room[PIECE];
        widen_row(gate_up + t * stride + first, gate, n);
        widen_row(gate_up + t * stride + size + first, up, n);
        activate(gate, up, room, n, gelu);
        narrow_row(gate, y + t * size + first, n);
    });
}

template <class T>
void write_kv(const T *k, int64_t k_t, int64_t k_h, const T *v, int64_t v_t, int64_t v_h,
              T *k_cache, int64_t kc_h, int64_t kc_n, T *v_cache, int64_t vc_h, int64_t vc_n,
              const int64_t *slots, int64_t tokens, int64_t heads, int64_t dim, int64_t v_dim,
              int threads) {
    parallel(tokens, 64, threads, [&](int64_t t) {
        for (int64_t h = 0; h < heads; h++) {
            std::memcpy(k_cache + h * kc_h + slots[t] * kc_n, k + t * k_t + h * k_h, dim * sizeof(T));
            std::memcpy(v_cache + h * vc_h + slots[t] * vc_n, v + t * v_t + h * v_h, v_dim * sizeof(T));
        }
    });
}

// -- attention -----------------------------------------------------------------------------------

template <class T>
struct Attention {
    const T *q, *k, *v;  // (T, heads, dim), (kv_heads, N, dim), (kv_heads, N, v_dim)
    int64_t q_t, q_h, k_h, k_n, v_h, v_n;
    int64_t heads, kv_heads, dim, v_dim;
    const int64_t *positions;
    float scale, softcap;  // softcap 0: none
    int64_t window;        // 0: none
    float *o, *lse;        // partials (P, heads, v_dim), (P, heads)
};

// Scores of K keys under V vectors of query rows, (K, V * LANES), and the largest so far of each row.
template <int V, int K>
[[gnu::noinline]] void scores_tile(const float *q, const float *keys, int64_t stride, int64_t dim,
                                   float *scores, float *top) {
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
    for (int v = 0; v < V; v++) {
        vec most = load(top + v * LANES);
        for (int k = 0; k < K; k++) {
            store(scores + (k * V + v) * LANES, sum[k][v]);
            most = sum[k][v] > most ? sum[k][v] : most;
        }
        store(top + v * LANES, most);
    }
}

template <int V>
void scores_of(const float *q, const float *keys, int64_t stride, int64_t n, int64_t dim,
               float *scores, float *top) {
    constexpr int K = std::min(SCORE_TILE / V, 12);
    int64_t j = 0;
    for (; j + K <= n; j += K)
        scores_tile<V, K>(q, keys + j * stride, stride, dim, scores + j * V * LANES, top);
    for (; j < n; j++)
        scores_tile<V, 1>(q, keys + j * stride, stride, dim, scores + j * V * LANES, top);
}

// Adds n weighted values to V vectors of channels of R rows, or to 0 if `fresh`: weights (n, rows) or,
// `by_row`, (R, rows), values (n, stride).
template <int R, int V, bool by_row>
[[gnu::noinline]] void values_tile(const float *weights, int64_t rows, const float *values,
                                   int64_t stride, int64_t n, float *out, int64_t out_stride,
                                   bool fresh) {
    vec sum[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
            sum[r][v] = fresh ? vec{} : load(out + r * out_stride + v * LANES);
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

// The same for all channels of R rows.
template <int R, bool by_row = false>
void add_values(const float *weights, int64_t rows, const float *values, int64_t stride, int64_t n,
                float *out, int64_t width, bool fresh) {
    int64_t c = 0;
#ifdef __AVX512F__
    for (; c + 4 * LANES <= width; c += 4 * LANES)
        values_tile<R, 4, by_row>(weights, rows, values + c, stride, n, out + c, width, fresh);
#endif
    for (; c + 2 * LANES <= width; c += 2 * LANES)
        values_tile<R, 2, by_row>(weights, rows, values + c, stride, n, out + c, width, fresh);
    for (; c < width; c += LANES)
        values_tile<R, 1, by_row>(weights, rows, values + c, stride, n, out + c, width, fresh);
}

// A block of keys or values in float32 with rows of `width` (a multiple of LANES for values).
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

void soft_cap(float *scores, int64_t n, float softcap) {
    for (int64_t i = 0; i < n; i++) scores[i] /= softcap;
    vmsTanh(n, scores, scores, HIGH_ACCURACY);
    for (int64_t i = 0; i < n; i++) scores[i] *= softcap;
}

// The largest score (n, rows) of each row, of keys in [low, high).
void largest_inside(const float *scores, int64_t n, int64_t rows, const int32_t *low,
                    const int32_t *high, float *top) {
    for (int64_t v = 0; v < rows; v += LANES) {
        const ivec from = read<ivec>(low + v), to = read<ivec>(high + v);
        vec most = splat(-INF);
        for (int64_t j = 0; j < n; j++) {
            const ivec key = ivec{} + (int32_t)j;
            const vec s = load(scores + j * rows + v);
            most = (key >= from) & (key < to) & (s > most) ? s : most;
        }
        store(top + v, most);
    }
}
// Sets (n, rows) to 0 where keys [first, first + n) are outside [low, high) of a row.
void clear_outside(float *x, int64_t first, int64_t n, int64_t rows, const int32_t *low,
                   const int32_t *high) {
    for (int64_t v = 0; v < rows; v += LANES) {
        const ivec from = read<ivec>(low + v), to = read<ivec>(high + v);
        for (int64_t j = 0; j < n; j++) {
            const ivec key = ivec{} + (int32_t)(first + j);
            float *at = x + j * rows + v;
            store(at, (key >= from) & (key < to) ? load(at) : vec{});
        }
    }
}

// Writes sums / by and the log-sum-exp of a partial and head.
template <class T>
inline void write_partial(const Attention<T> &a, int64_t at, const float *sums, float by,
                          float lse) {
    const int64_t size = a.v_dim;
    float *to = a.o + at * size;
    int64_t c = 0;
    for (; c + LANES <= size; c += LANES) store(to + c, load(sums + c) / splat(by));
    for (; c < size; c++) to[c] = sums[c] / by;
    a.lse[at] = lse;
}

// As `kernels/forest_attention/plan.py` has it: queries, keys, the position of the first key, and the partial of
// the first query.
struct Item {
    int64_t query, num_queries, key, num_keys, position, partial;
};

// Keys and values that are attended to next: they come from memory while others are in use.
struct Ahead {
    const char *k = nullptr, *v = nullptr;
    int64_t k_bytes = 0, v_bytes = 0;

    template <class T>
    static Ahead of(const Attention<T> &a, int64_t head, int64_t key, int64_t num_keys) {
        return {(const char *)(a.k + head * a.k_h + key * a.k_n),
                (const char *)(a.v + head * a.v_h + key * a.v_n),
                num_keys * a.k_n * (int64_t)sizeof(T), num_keys * a.v_n * (int64_t)sizeof(T)};
    }
};
// Fetches a part of `bytes` bytes, the whole of them in `parts` parts.
inline void fetch(const char *from, int64_t bytes, int64_t part, int64_t parts) {
    const int64_t step = (bytes / parts + 64) / 64 * 64;
    for (int64_t i = part * step; i < std::min(bytes, (part + 1) * step); i += 64)
        __builtin_prefetch(from + i);
}

// Log-sum-exps that lack the logarithm of their sum: taken together, since a call to MKL takes as long
// for one number as for sixty.
struct Logs {
    static constexpr int MOST = 64;
    int n = 0;
    int64_t at[MOST];
    float total[MOST];

    template <class T>
    void add(const Attention<T> &a, int64_t place, float sum) {
        if (n == MOST) write(a);
        at[n] = place;
        total[n++] = sum;
    }
    template <class T>
    void write(const Attention<T> &a) {
        vmsLn(n, total, total, HIGH_ACCURACY);
        for (int i = 0; i < n; i++) a.lse[at[i]] += total[i];
        n = 0;
    }
};

// Scores (R, stride) of n keys under R query rows (R, dim); behind them anything.
template <int R, class T>
[[gnu::noinline]] void few_scores(const float *q, const T *keys, int64_t k_stride, int64_t n,
                                  int64_t dim, float *scores, int64_t stride, const Ahead &ahead) {
    thread_local std::vector<T> tail;
    const int64_t parts = (n + LANES - 1) / LANES;
    for (int64_t j = 0; j < n; j += LANES) {
        fetch(ahead.k, ahead.k_bytes, j / LANES, parts);
        const T *block = keys + j * k_stride;
        if (j + LANES > n) {  // nothing is read behind the last key
            T *rows = room(tail, LANES * k_stride);
            std::copy_n(block, (n - j - 1) * k_stride + dim, rows);
            block = rows;
        }
        vec sum[R];
        for (int r = 0; r < R; r++) sum[r] = vec{};
        for (int64_t d = 0; d < dim; d += LANES) {
            vec key[LANES];
            for (int i = 0; i < LANES; i++) key[i] = load(block + i * k_stride + d);
            transpose(key);
            for (int i = 0; i < LANES; i++)
                for (int r = 0; r < R; r++) sum[r] = fma(splat(q[r * dim + d + i]), key[i], sum[r]);
        }
        for (int r = 0; r < R; r++) store(scores + r * stride + j, sum[r]);
    }
}

// Weights of the values, in place of the scores (R, stride): 0 outside keys [low, high) of a row.
// Also the largest score and the sum of the weights of each row.
template <int R>
void few_weights(float *scores, int64_t stride, float softcap, const int32_t *low,
                 const int32_t *high, float *top, float *total) {
    if (softcap > 0) soft_cap(scores, R * stride, softcap);
    const auto inside = [&](int r, int64_t j, vec yes, float no) {
        const ivec at = LANE + (int32_t)j;
        return (at >= low[r]) & (at < high[r]) ? yes : splat(no);
    };
    for (int r = 0; r < R; r++) {
        float *row = scores + r * stride;
        vec most = splat(-INF);
        for (int64_t j = 0; j < stride; j += LANES) {
            const vec s = inside(r, j, load(row + j), -INF);
            most = s > most ? s : most;
        }
        top[r] = largest(most);
        top[r] = top[r] == -INF ? 0 : top[r];
        // The exponential of -inf would take 25 times as long.
        for (int64_t j = 0; j < stride; j += LANES)
            store(row + j, inside(r, j, load(row + j) - splat(top[r]), 0));
    }
    vmsExp(R * stride, scores, scores, HIGH_ACCURACY);
    for (int r = 0; r < R; r++) {
        float *row = scores + r * stride;
        for (int64_t j = 0; j < stride; j += LANES) store(row + j, inside(r, j, load(row + j), 0));
        total[r] = row_sum(row, stride);
    }
}

// As `attend`, of R query rows in all: a vector holds keys, not rows.
template <int R, class T>
void attend_few(const Attention<T> &a, int64_t head, const Item &item, const Ahead &ahead,
                Logs &logs) {
    const auto [query, num_queries, key, num_keys, position, partial] = item;
    thread_local struct {
        std::vector<float> values, rest;
    } kept;
    const int64_t groups = a.heads / a.kv_heads, width = (a.v_dim + LANES - 1) / LANES * LANES;
    const int64_t stride = (num_keys + 31) / 32 * 32;
    float *scores = room(kept.rest, R * (stride + a.dim + width));
    float *q = scores + R * stride, *sums = q + R * a.dim;
    int32_t low[R], high[R];
    int64_t at[R];
    for (int64_t r = 0, t = query, g = 0; r < R; r++) {
        const T *from = a.q + t * a.q_t + (head * groups + g) * a.q_h;
        for (int64_t d = 0; d < a.dim; d += LANES)
            store(q + r * a.dim + d, load(from + d) * splat(a.scale));
        const int64_t own = a.positions[t] - position;  // its own place among the keys
        high[r] = std::clamp<int64_t>(own + 1, 0, num_keys);
        low[r] = a.window ? std::clamp<int64_t>(own - a.window + 1, 0, num_keys) : 0;
        at[r] = (partial + t - query) * a.heads + head * groups + g;
        if (++g == groups) t++, g = 0;
    }
    few_scores<R>(q, a.k + head * a.k_h + key * a.k_n, a.k_n, num_keys, a.dim, scores, stride,
                  ahead);
    float top[R], total[R];
    few_weights<R>(scores, stride, a.softcap, low, high, top, total);
    int64_t v_stride = a.v_n;
    const float *values = block_of(a.v + head * a.v_h + key * a.v_n, v_stride, num_keys, a.v_dim,
                                   width, kept.values);
    constexpr int FIRST = std::min(R, 4);
    for (int64_t j = 0; j < num_keys; j += 32) {
        const int64_t here = std::min<int64_t>(32, num_keys - j);
        const float *weights = scores + j, *from = values + j * v_stride;
        fetch(ahead.v, ahead.v_bytes, j / 32, stride / 32);
        add_values<FIRST, true>(weights, stride, from, v_stride, here, sums, width, j == 0);
        if constexpr (R > FIRST)
            add_values<R - FIRST, true>(weights + FIRST * stride, stride, from, v_stride, here,
                                        sums + FIRST * width, width, j == 0);
    }
    for (int r = 0; r < R; r++) {
        write_partial(a, at[r], sums + r * width, total[r] > 0 ? total[r] : 1, top[r]);
        logs.add(a, at[r], total[r]);
    }
}

// Query rows of a head, [first, first + n) of an item's, laid as (dim, rows): vectors of rows.
struct QueryRows {
    int64_t first, n, vectors, rows;
    float *q;
    int64_t earliest, latest;  // position
};

template <class T>
QueryRows lay_queries(const Attention<T> &a, int64_t head, const Item &item, int64_t first) {
    thread_local std::vector<float> kept;
    const int64_t groups = a.heads / a.kv_heads;
    const int64_t n = std::min<int64_t>(item.num_queries * groups - first, MAX_VECTORS * LANES);
    int64_t vectors = (n + LANES - 1) / LANES;
    if (vectors == 5) vectors = 6;
    const int64_t rows = vectors * LANES;
    float *q = room(kept, a.dim * rows);
    const T *q_rows[MAX_VECTORS * LANES];
    int64_t t = item.query + first / groups, g = first % groups;
    QueryRows laid = {first, n, vectors, rows, q, a.positions[t], a.positions[t]};
    for (int64_t r = 0; r < n; r++) {
        q_rows[r] = a.q + t * a.q_t + (head * groups + g) * a.q_h;
        laid.earliest = std::min(laid.earliest, a.positions[t]);
        laid.latest = std::max(laid.latest, a.positions[t]);
        if (++g == groups) t++, g = 0;
    }
    if (n < rows) std::fill_n(q, a.dim * rows, 0.0f);
    for (int64_t v = 0; v < n; v += LANES)
        lay([&](int64_t r) { return q_rows[v + r]; }, std::min<int64_t>(n - v, LANES), a.dim, q + v,
            rows);
    for (int64_t i = 0; i < a.dim * rows; i += LANES) store(q + i, load(q + i) * splat(a.scale));
    return laid;
}

// Partials of laid query rows over an item's keys.
template <class T>
void attend_rows(const Attention<T> &a, int64_t head, const Item &item, const QueryRows &laid) {
    thread_local std::vector<float> keys_buffer, values_buffer, scores_buffer, out_buffer;
    const int64_t groups = a.heads / a.kv_heads, width = (a.v_dim + LANES - 1) / LANES * LANES;
    const int64_t num_keys = item.num_keys, n = laid.n, rows = laid.rows, vectors = laid.vectors;
    int64_t k_stride = a.k_n, v_stride = a.v_n;
    const float *keys = block_of(a.k + head * a.k_h + item.key * a.k_n, k_stride, num_keys, a.dim,
                                 a.dim, keys_buffer);
    const float *values = block_of(a.v + head * a.v_h + item.key * a.v_n, v_stride, num_keys,
                                   a.v_dim, width, values_buffer);
    float *scores = room(scores_buffer, num_keys * rows), *sums_of_values = room(out_buffer, rows * width);

    int32_t low[MAX_VECTORS * LANES], high[MAX_VECTORS * LANES];
    const int64_t last = item.position + num_keys - 1;
    const bool masked = laid.earliest < last || (a.window && laid.latest - item.position >= a.window);
    if (masked || a.softcap > 0) {
        std::fill_n(low, rows, 0);
        std::fill_n(high, rows, (int32_t)num_keys);
        int64_t t = item.query + laid.first / groups, g = laid.first % groups;
        for (int64_t r = 0; r < n; r++) {
            const int64_t at = a.positions[t] - item.position;  // its own place among the keys
            high[r] = std::clamp<int64_t>(at + 1, 0, num_keys);
            if (a.window) low[r] = std::clamp<int64_t>(at - a.window + 1, 0, num_keys);
            if (++g == groups) t++, g = 0;
        }
    }
    float top[MAX_VECTORS * LANES], total[MAX_VECTORS * LANES], log_total[MAX_VECTORS * LANES];
    std::fill_n(top, rows, -INF);
    switch (vectors) {
        case 1: scores_of<1>(laid.q, keys, k_stride, num_keys, a.dim, scores, top); break;
        case 2: scores_of<2>(laid.q, keys, k_stride, num_keys, a.dim, scores, top); break;
        case 3: scores_of<3>(laid.q, keys, k_stride, num_keys, a.dim, scores, top); break;
#ifdef __AVX512F__
        case 4: scores_of<4>(laid.q, keys, k_stride, num_keys, a.dim, scores, top); break;
        default: scores_of<6>(laid.q, keys, k_stride, num_keys, a.dim, scores, top);
#endif
    }
    if (a.softcap > 0) soft_cap(scores, num_keys * rows, a.softcap);
    if (a.softcap > 0 || masked) largest_inside(scores, num_keys, rows, low, high, top);
    for (int64_t r = 0; r < rows; r++) top[r] = top[r] == -INF ? 0 : top[r];

    // So many keys at a time that their weights stay in the first cache from the exponential to the
    // values. A weight joins the sums in the order of `row_sum`; a term that is not there would add 0.
    vec sums[MAX_VECTORS][32];
    const int64_t piece = std::max<int64_t>(32, 8192 / rows / 32 * 32);
    for (int64_t j = 0; j < num_keys; j += piece) {
        const int64_t here = std::min(piece, num_keys - j);
        float *weights = scores + j * rows;
        for (int64_t v = 0; v < rows; v += LANES) {
            const vec most = load(top + v);
            for (int64_t i = 0; i < here; i++)
                store(weights + i * rows + v, load(weights + i * rows + v) - most);
        }
        // The exponential of -inf would take 25 times as long.
        if (masked) clear_outside(weights, j, here, rows, low, high);
        vmsExp(here * rows, weights, weights, HIGH_ACCURACY);
        if (masked) clear_outside(weights, j, here, rows, low, high);
        for (int64_t v = 0; v < vectors; v++)
            for (int64_t lane = 0; lane < std::min<int64_t>(32, num_keys); lane++) {
                vec sum = j ? sums[v][lane] : vec{};
                for (int64_t i = lane; i < here; i += 32)
                    sum += load(weights + i * rows + v * LANES);
                sums[v][lane] = sum;
            }
        const float *from = values + j * v_stride;
        for (int64_t r = 0; r < n;) {
            float *to = sums_of_values + r * width;
            const auto add = [&](auto count) {
                constexpr int R = decltype(count)::value;
                add_values<R>(weights + r, rows, from, v_stride, here, to, width, j == 0);
                r += R;
            };
            if (n - r > 4 && rows - r >= 6)
                add(std::integral_constant<int, 6>{});
            else if (n - r > 2)
                add(std::integral_constant<int, 4>{});
            else
                add(std::integral_constant<int, 2>{});
        }
    }
    for (int64_t v = 0; v < vectors; v++) {
        const auto sum_of = [&](int lane) { return lane < num_keys ? sums[v][lane] : vec{}; };
        vec sum = {};
        for (int lane = 0; lane < std::min<int64_t>(8, num_keys); lane++)
            sum += sum_of(lane) + sum_of(lane + 8) + sum_of(lane + 16) + sum_of(lane + 24);
        store(total + v * LANES, sum);
    }
    vmsLn(n, total, log_total, HIGH_ACCURACY);
    int64_t at = (item.partial + laid.first / groups) * a.heads + head * groups;
    int64_t g = laid.first % groups;
    for (int64_t r = 0; r < n; r++) {
        const float by = total[r] > 0 ? total[r] : 1;
        write_partial(a, at + g, sums_of_values + r * width, by, top[r] + log_total[r]);
        if (++g == groups) at += a.heads, g = 0;
    }
}

// Partials of one key/value head of items [item, end), all of the same queries. What goes to `logs` is
// for the caller to write.
template <class T>
void attend(const Attention<T> &a, int64_t head, const Item *item, const Item *end,
            const Ahead &ahead, Logs &logs) {
    const int64_t all = item->num_queries * (a.heads / a.kv_heads);
    if (all <= 8 && a.dim % LANES == 0) {
        for (; item < end; item++) {
            const auto few = [&](auto run) { run(a, head, *item, ahead, logs); };
            switch (all) {
                case 1: few(attend_few<1, T>); break;
                case 2: few(attend_few<2, T>); break;
                case 3: few(attend_few<3, T>); break;
                case 4: few(attend_few<4, T>); break;
                case 5: few(attend_few<5, T>); break;
                case 6: few(attend_few<6, T>); break;
                case 7: few(attend_few<7, T>); break;
                default: few(attend_few<8, T>);
            }
        }
        return;
    }
    fetch(ahead.k, ahead.k_bytes, 0, 1);
    fetch(ahead.v, ahead.v_bytes, 0, 1);
    for (int64_t first = 0; first < all; first += MAX_VECTORS * LANES) {
        const QueryRows laid = lay_queries(a, head, *item, first);
        for (const Item *i = item; i < end; i++) attend_rows(a, head, *i, laid);
    }
}

template <class T>
void attend_items(const Attention<T> &a, const Item *items, int64_t n, int threads) {
    // Neighbours with the same queries and few keys make up one task.
    constexpr int64_t ENOUGH_KEYS = 128;
    thread_local std::vector<int64_t> kept;
    int64_t *starts = room(kept, n + 1), tasks = 0, keys = 0;
    for (int64_t i = 0; i < n; i++) {
        const bool same = i && items[i].query == items[i - 1].query &&
                          items[i].num_queries == items[i - 1].num_queries;
        if (!same || keys >= ENOUGH_KEYS) starts[tasks++] = i, keys = 0;
        keys += items[i].num_keys;
    }
    starts[tasks] = n;
    parallel(tasks * a.kv_heads, 1, threads, [&, starts](int64_t task) {
        Logs logs;
        const int64_t *run = starts + task / a.kv_heads;
        attend(a, task % a.kv_heads, items + run[0], items + run[1], {}, logs);
        logs.write(a);
    });
}

// Every slot's own keys, split by split; the partial of slot s and split j is j * num_slots + s.
template <class T>
void attend_suffixes(const Attention<T> &a, const int64_t *row_of_slot, const int64_t *length,
                     const int64_t *position, int64_t num_slots, int64_t base, int64_t capacity,
                     int64_t max_split, int64_t num_splits, int threads) {
    struct Own {
        int64_t row, start, keys, first;
    };
    const auto own = [&](int64_t partial) -> Own {
        const int64_t slot = partial % num_slots, start = partial / num_slots * max_split;
        const int64_t row = row_of_slot[slot];
        const int64_t keys = row < 0 ? 0 : std::clamp<int64_t>(length[row] - start, 0, max_split);
        return {row, start, keys, base + slot * capacity + start};
    };
    parallel_blocks(num_splits * num_slots, 8, threads, [&](int64_t first, int64_t last) {
        Logs logs;
        Own next = own(first);
        for (int64_t partial = first; partial < last; partial++) {
            const Own mine = next;
            if (partial + 1 < last) next = own(partial + 1);
            if (!mine.keys)
                std::fill_n(a.lse + partial * a.heads, a.heads, -INF);
            else
                for (int64_t head = 0; head < a.kv_heads; head++) {
                    const bool same = head + 1 < a.kv_heads;
                    const Item item = {mine.row,  1, mine.first, mine.keys,
                                       position[mine.row] + mine.start, partial};
                    attend(a, head, &item, &item + 1,
                           Ahead::of(a, same ? head + 1 : 0, same ? mine.first : next.first,
                                     same ? mine.keys : next.keys),
                           logs);
                }
        }
        logs.write(a);
    });
}

// Merge of each query's partials index (T, J), -1 where there is none.
template <class T>
void merge(const float *o, const float *lse, const int64_t *index, int64_t queries, int64_t most,
           int64_t heads, int64_t v_dim, T *out, float *out_lse, int threads) {
    parallel(queries, 8, threads, [&](int64_t t) {
        thread_local std::vector<float> kept;
        thread_local std::vector<int64_t> kept_partials;
        int64_t *partials = room(kept_partials, most), n = 0;
        for (int64_t j = 0; j < most; j++)
            if (index[t * most + j] >= 0) partials[n++] = index[t * most + j] * heads;
        float *weights = room(kept, heads * (n + 3)), *top = weights + n * heads;
        float *total = top + heads, *log_total = total + heads;
        std::fill_n(top, heads, -INF);
        for (int64_t j = 0; j < n; j++)
            for (int64_t h = 0; h < heads; h++) {
                const float log = lse[partials[j] + h];
                top[h] = log > top[h] || log != log ? log : top[h];
            }
        for (int64_t h = 0; h < heads; h++) top[h] = top[h] == -INF ? 0 : top[h];
        for (int64_t j = 0; j < n; j++)
            for (int64_t h = 0; h < heads; h++)
                weights[j * heads + h] = lse[partials[j] + h] - top[h];
        vmsExp(n * heads, weights, weights, HIGH_ACCURACY);
        for (int64_t h = 0; h < heads; h++) {
            total[h] = 0;
            for (int64_t j = 0; j < n; j++) total[h] += weights[j * heads + h];
        }
        vmsLn(heads, total, log_total, HIGH_ACCURACY);
        for (int64_t h = 0; h < heads; h++) {
            const float by = total[h] != 0 ? total[h] : 1;
            T *to = out + (t * heads + h) * v_dim;
            // A partial of weight 0 may hold anything.
            const auto sum = [&](auto zero, auto get, int64_t c) {
                for (int64_t j = 0; j < n; j++) {
                    const float weight = weights[j * heads + h];
                    if (weight != 0) zero += get(o + (partials[j] + h) * v_dim + c) * weight;
                }
                return zero / by;
            };
            int64_t c = 0;
            for (; c + LANES <= v_dim; c += LANES)
                store(to + c, sum(vec{}, [](const float *x) { return load(x); }, c));
            for (; c < v_dim; c++) narrow(sum(0.0f, [](const float *x) { return *x; }, c), to + c);
            out_lse[t * heads + h] = top[h] + log_total[h];
        }
    });
}

// -- linear layers -------------------------------------------------------------------------------

constexpr int COLUMNS = 2 * LANES;          // of a panel of packed weights
constexpr int ROWS = LANES == 16 ? 14 : 6;  // most rows of a tile: 2 accumulators each
// Terms added before their sum joins the others': as in models/transformer.py, or bits differ.
constexpr int64_t SUM_BLOCK = 256;

// A panel holds COLUMNS columns term by term. In bfloat16 a 32-bit word holds columns i and
// i + LANES, so that one load gives both vectors.
inline void panel(const float *w, vec &a, vec &b) {
    a = load(w);
    b = load(w + LANES);
}
inline void panel(const bf16 *w, vec &a, vec &b) {
    const ivec both = read<ivec>(w);
    a = (vec)(both << 16);
    b = (vec)(both & (int32_t)0xFFFF0000);
}

// With `paired`, W holds two matrices, and a panel LANES columns of each: gate and up.
template <class W>
void pack(const W *weight, int64_t n, int64_t k, int64_t paired, W *packed, int threads) {
    const int64_t apart = paired ? n / 2 : LANES, across = paired ? LANES : COLUMNS;
    const int64_t end = paired ? n / 2 : n;
    parallel((end + across - 1) / across, 1, threads, [&](int64_t p) {
        for (int64_t c = 0; c < COLUMNS; c++) {
            const int64_t of_first = p * across + c % LANES;
            const int64_t column = of_first + c / LANES * apart;
            const bool there = paired ? of_first < end : column < end;
            const int64_t place = sizeof(W) == 4 ? c : c % LANES * 2 + c / LANES;
            for (int64_t i = 0; i < k; i++)
                packed[(p * k + i) * COLUMNS + place] = there ? weight[column * k + i] : W{};
        }
    });
}

enum Activation { NONE, SILU, GELU };

// M rows, laid term by term in x (k, M), times a panel, into y (M, COLUMNS) of rows `y_stride` apart,
// or into y (M, LANES) if the panel is paired and activated. Meanwhile `step` bytes a term are
// fetched from `ahead` into the second cache: a panel comes from memory while the one before it is
// in use, or its first tile would wait.
template <int M, class T>
[[gnu::noinline]] void linear_tile(const float *x, const T *weight, int64_t k, const float *bias,
                                   Activation activation, const char *ahead, int64_t step, T *y,
                                   int64_t y_stride) {
    float total[2][M][LANES];
    for (int64_t start = 0; start < k; start += SUM_BLOCK) {
        vec sum[M][2];  // "= {}" would clear it in memory
        for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = vec{};
        const int64_t stop = std::min(k, start + SUM_BLOCK);
#pragma GCC unroll 4
        for (int64_t i = start; i < stop; i++) {
            vec a, b;
            __builtin_prefetch(weight + (i + 16) * COLUMNS);
            __builtin_prefetch(ahead + i * step, 0, 2);
            panel(weight + i * COLUMNS, a, b);
            for (int m = 0; m < M; m++) {
                const vec by = splat(x[i * M + m]);
                sum[m][0] = fma(by, a, sum[m][0]);
                sum[m][1] = fma(by, b, sum[m][1]);
            }
        }
        for (int m = 0; m < M; m++)
            for (int v = 0; v < 2; v++) {
                vec all = sum[m][v];
                if (start)
                    all = load(total[v][m]) + all;
                else if (bias)
                    all += load(bias + v * LANES);
                if (stop < k || activation)
                    store(total[v][m], all);
                else
                    store(y + m * y_stride + v * LANES, all);
            }
    }
    if (activation) {
        float room[M * LANES];
        activate(total[0][0], total[1][0], room, M * LANES, activation == GELU);
        for (int m = 0; m < M; m++) store(y + m * y_stride, load(total[0][m]));
    }
}

template <int M, class T>
void linear_rows(int64_t rows, const float *x, const T *weight, int64_t k, const float *bias,
                 Activation activation, const char *ahead, int64_t step, T *y, int64_t y_stride) {
    if constexpr (M > 0) {
        if (rows == M)
            return linear_tile<M>(x, weight, k, bias, activation, ahead, step, y, y_stride);
        linear_rows<M - 1>(rows, x, weight, k, bias, activation, ahead, step, y, y_stride);
    }
}

// Rows of a linear layer's input, laid for its tiles: tile by tile, term by term.
struct Laid {
    int64_t m, k, tile;
    float *data;
    std::vector<float> kept;

    // Makes room for m rows of k numbers.
    void resize(int64_t rows, int64_t terms) {
        m = rows, k = terms;
        const int64_t tiles = (m + ROWS - 1) / ROWS;
        tile = tiles ? (m + tiles - 1) / tiles : 1;
        data = room(kept, m * k);
    }
    // Fills it: row_of(t) gives row t, which stays until the tile's last is there.
    template <class F>
    void fill(F row_of, int threads) {
        parallel((m + tile - 1) / tile, 1, threads, [&](int64_t task) {
            const int64_t first = task * tile, here = std::min(tile, m - first);
            decltype(row_of(0)) rows[ROWS];
            for (int64_t r = 0; r < here; r++) rows[r] = row_of(first + r);
            lay([&](int64_t r) { return rows[r]; }, here, k, data + first * k, here);
        });
    }
};

// y (m, n) = x (m, k) W^T + bias (n), W (n, k) packed; or, activated, y = act(x W0^T) * (x W1^T), W0
// and W1 (n, k) packed as a pair.
template <class T>
void linear(const Laid &x, const T *weight, int64_t n, const T *bias, T *y, int threads,
            Activation activation = NONE) {
    const int64_t m = x.m, k = x.k, tile = x.tile;
    if (!m) return;
    const float *laid = x.data;
    const int64_t across = activation ? LANES : COLUMNS;  // columns that a panel gives
    const int64_t panels = (n + across - 1) / across, tiles = (m + tile - 1) / tile;
    // Rows that stay in the second cache while the panels pass by, and fewer where there are so few
    // panels that the last ones would keep one thread busy for long.
    const int64_t fit = std::max<int64_t>(1, (3 << 18) / (4 * k * tile));
    const int64_t least = threads > 1 ? (8 * threads + panels - 1) / panels : 1;
    const int64_t block = std::min(fit, (tiles + least - 1) / least) * tile;
    const int64_t blocks = (m + block - 1) / block;
    // Neighbouring panels to one thread, so that it finds what it fetched ahead; several for each.
    const int64_t grain = std::clamp<int64_t>(blocks * panels / (4 * threads), 1, 8);
    parallel(blocks * panels, grain, threads, [&](int64_t task) {
        const int64_t p = task % panels, first = task / panels * block;
        const int64_t last = std::min(m, first + block);
        const int64_t columns = std::min<int64_t>(across, n - p * across);
        const T *mine = weight + p * COLUMNS * k;
        const int64_t step = COLUMNS * sizeof(T) / ((last - first + tile - 1) / tile);
        const char *ahead = (const char *)(mine + COLUMNS * k);
        float b[COLUMNS];
        if (bias) {
            std::fill_n(b, COLUMNS, 0.0f);
            widen_row(bias + p * COLUMNS, b, columns);
        }
        for (int64_t t = first; t < last; t += tile) {
            const int64_t here = std::min(tile, m - t);
            T *to = y + t * n + p * across, out[ROWS * COLUMNS];
            const bool whole = columns == across;
            linear_rows<ROWS>(here, laid + t * k, mine, k, bias ? b : nullptr, activation, ahead,
                              step, whole ? to : out, whole ? n : across);
            ahead += step * k;
            if (!whole)
                for (int64_t r = 0; r < here; r++) std::copy_n(out + r * across, columns, to + r * n);
        }
    });
}
template <class T>
void linear(const T *x, int64_t m, int64_t k, const T *weight, int64_t n, const T *bias, T *y,
            int threads) {
    thread_local Laid laid;
    laid.resize(m, k);
    laid.fill([&](int64_t t) { return x + t * k; }, threads);
    linear(laid, weight, n, bias, y, threads);
}

// -- the decoder -----------------------------------------------------------------------------

}  // namespace

// Weights of a layer: matrices packed, a null pointer for what the model does not have. `chunks`
// (num_chunks, 6) int64: items, number of items, index, its columns, first and last query.
struct Layer {
    const void *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *post_attention_norm,
        *pre_feedforward_norm, *post_feedforward_norm, *gate_up, *down;
    void *k_cache, *v_cache;  // (kv_heads, cells, dim), (kv_heads, cells, v_dim)
    const int64_t *chunks;
    int64_t num_chunks, window;
    float scale, softcap;
};

struct Decoder {
    const void *embedding, *norm;
    const Layer *layers;
    int64_t num_layers, hidden, heads, kv_heads, dim, v_dim, intermediate, cells;
    int64_t plus_one, gelu;
    float eps, embedding_scale;  // 0: none
};

// Every slot's own keys (`SuffixTiles`); num_splits 0: there are none.
struct Suffix {
    const int64_t *row, *length, *position;
    int64_t num_slots, base, capacity, max_split, num_splits;
};

namespace {

// The hidden states (n, hidden) of n tokens after the final norm: `Transformer.forward`.
template <class T>
void decode(const Decoder &d, const int64_t *tokens, int64_t n, const int64_t *positions,
            const float *cos, const float *sin, const int64_t *slots, const Suffix &suffix,
            float *o, float *lse, T *out, int threads) {
    const int64_t q_size = d.heads * d.dim, k_size = d.kv_heads * d.dim;
    const int64_t v_size = d.kv_heads * d.v_dim, qkv_size = q_size + k_size + v_size;
    const int64_t half = d.dim / 2, kept = n * d.hidden;
    // Two residual streams, since a norm reads one while it writes the other.
    thread_local std::vector<T> scratch;
    thread_local std::vector<float> lse_scratch, wide_scratch;
    thread_local Laid laid;
    const int64_t attended_size = d.heads * d.v_dim;
    const int64_t wide = qkv_size + q_size + attended_size + d.intermediate;
    float *merged_lse = room(lse_scratch, n * d.heads);
    T *hidden = room(scratch, 3 * kept + n * wide), *next = hidden + kept, *update = next + kept;
    T *qkv = update + kept, *q = qkv + n * qkv_size, *attended = q + n * q_size;
    T *active = attended + n * attended_size;

    const auto norm_update = [&](const void *weight) {
        rms_norm<T>(update, d.hidden, d.hidden, nullptr, (const T *)weight, update, nullptr, n, 1,
                    d.hidden, d.eps, d.plus_one, threads);
    };
    // hidden = hidden + update, and its norm is given row by row to `to`.
    const auto add_and_norm = [&](const void *weight, bool first, auto to) {
        const float *w = widened((const T *)weight, d.hidden, wide_scratch);
        to([&, w](int64_t t, T *y) {
            const T *old = hidden + t * d.hidden;
            rms_norm_row(first ? old : update + t * d.hidden, first ? nullptr : old, w, y,
                         next + t * d.hidden, d.hidden, d.eps, d.plus_one);
        });
        if (!first) std::swap(hidden, next);
    };
    const auto lay_norm = [&](const void *weight, bool first = false) {
        laid.resize(n, d.hidden);
        const int64_t tile = laid.tile;
        add_and_norm(weight, first, [&](auto norm_row) {
            laid.fill([&](int64_t t) {
                thread_local std::vector<T> rows;
                T *y = room(rows, ROWS * d.hidden) + t % tile * d.hidden;
                norm_row(t, y);
                return (const T *)y;
            }, threads);
        });
    };
    const auto lay_rows = [&](const T *x, int64_t k) {
        laid.resize(n, k);
        laid.fill([&](int64_t t) { return x + t * k; }, threads);
    };
    // Norms and turns the heads of queries and keys; keys and values go into the cache.
    const auto turn_and_write = [&](const Layer &layer) {
        std::vector<float> q_wide, k_wide;
        const T *q_norm = (const T *)layer.q_norm, *k_norm = (const T *)layer.k_norm;
        const float *q_weight = q_norm ? widened(q_norm, d.dim, q_wide) : nullptr;
        const float *k_weight = k_norm ? widened(k_norm, d.dim, k_wide) : nullptr;
        parallel(n, std::max<int64_t>(1, 4096 / qkv_size), threads, [&](int64_t t) {
            const float *c = cos + positions[t] * half, *s = sin + positions[t] * half;
            const T *x = qkv + t * qkv_size;
            const auto turn = [&](const float *weight, T *y) {
                if (weight)
                    rms_norm_row<T>(x, nullptr, weight, y, nullptr, d.dim, d.eps, d.plus_one);
                rope_head<T>(weight ? y : x, c, s, y, half);
                x += d.dim;
            };
            for (int64_t h = 0; h < d.heads; h++) turn(q_weight, q + t * q_size + h * d.dim);
            for (int64_t h = 0; h < d.kv_heads; h++)
                turn(k_weight, (T *)layer.k_cache + (h * d.cells + slots[t]) * d.dim);
            for (int64_t h = 0; h < d.kv_heads; h++, x += d.v_dim)
                std::copy_n(x, d.v_dim, (T *)layer.v_cache + (h * d.cells + slots[t]) * d.v_dim);
        });
    };

    const T *table = (const T *)d.embedding;
    parallel(n, 16, threads, [&](int64_t t) {
        const T *from = table + tokens[t] * d.hidden;
        T *to = hidden + t * d.hidden;
        for (int64_t i = 0; i < d.hidden; i++)
            if (d.embedding_scale > 0)
                narrow(widen(from[i]) * d.embedding_scale, to + i);
            else
                to[i] = from[i];
    });
    for (int64_t i = 0; i < d.num_layers; i++) {
        const Layer &layer = d.layers[i];
        lay_norm(layer.input_norm, i == 0);
        linear(laid, (const T *)layer.qkv, qkv_size, (const T *)layer.qkv_bias, qkv, threads);
        turn_and_write(layer);
        const T *k_cache = (const T *)layer.k_cache, *v_cache = (const T *)layer.v_cache;
        const int64_t k_h = d.cells * d.dim, v_h = d.cells * d.v_dim;
        const Attention<T> a{q, k_cache, v_cache, q_size, d.dim, k_h, d.dim, v_h,
                             d.v_dim, d.heads, d.kv_heads, d.dim, d.v_dim, positions, layer.scale,
                             layer.softcap, layer.window, o, lse};
        if (suffix.num_splits)
            attend_suffixes(a, suffix.row, suffix.length, suffix.position, suffix.num_slots,
                            suffix.base, suffix.capacity, suffix.max_split, suffix.num_splits,
                            threads);
        for (int64_t c = 0; c < layer.num_chunks; c++) {
            const int64_t *chunk = layer.chunks + c * 6, start = chunk[4];
            attend_items(a, (const Item *)chunk[0], chunk[1], threads);
            merge(o, lse, (const int64_t *)chunk[2], chunk[5] - chunk[4], chunk[3], d.heads,
                  d.v_dim, attended + start * attended_size, merged_lse + start * d.heads, threads);
        }
        lay_rows(attended, attended_size);
        linear<T>(laid, (const T *)layer.o, d.hidden, nullptr, update, threads);
        if (layer.pre_feedforward_norm) {
            norm_update(layer.post_attention_norm);
            lay_norm(layer.pre_feedforward_norm);
        } else {
            lay_norm(layer.post_attention_norm);
        }
        linear<T>(laid, (const T *)layer.gate_up, d.intermediate, nullptr, active, threads,
                  d.gelu ? GELU : SILU);
        lay_rows(active, d.intermediate);
        linear<T>(laid, (const T *)layer.down, d.hidden, nullptr, update, threads);
        if (layer.post_feedforward_norm) norm_update(layer.post_feedforward_norm);
    }
    add_and_norm(d.norm, false, [&](auto norm_row) {
        parallel(n, 16, threads, [&](int64_t t) { norm_row(t, out + t * d.hidden); });
    });
}

// -- sampling ------------------------------------------------------------------------------------

// The first index whose running sum exceeds the threshold, which is lowered below the last one, and
// what of the threshold is left inside it. Only a row of NaN exceeds the last index.
int64_t search(const float *running, int64_t n, float &threshold) {
    threshold = std::min(threshold, std::nextafter(running[n - 1], 0.0f));
    int64_t i = std::upper_bound(running, running + n, threshold) - running;
    i = std::min(i, n - 1);
    threshold -= i ? running[i - 1] : 0;
    return i;
}

void running_sums(const float *x, int64_t n, float *running) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) running[i] = sum += x[i];
}

// Sums of tiles of `tile` weights, accumulated: (tiles,).
void running_tile_sums(const float *weights, int64_t vocab, int64_t tile, float *running) {
    const int64_t tiles = (vocab + tile - 1) / tile;
    for (int64_t j = 0; j < tiles; j++)
        running[j] = row_sum(weights + j * tile, std::min(tile, vocab - j * tile));
    running_sums(running, tiles, running);
}

template <class T>
void sample_token(const T *logits, int64_t batch, int64_t vocab, const float *uniform,
                  int64_t uniform_stride, float temperature, float min_p, float softcap,
                  int64_t tile, int64_t *token, float *logprob, float *sampling_logprob,
                  int threads) {
    parallel(batch, 1, threads, [&](int64_t row) {
        thread_local std::vector<float> kept;
        const int64_t tiles = (vocab + tile - 1) / tile;
        float *x = room(kept, 2 * vocab + 2 * tile + tiles), *weights = x + vocab;
        float *running = weights + vocab + tile, *inside = running + tiles;
        const T *from = logits + row * vocab;
        int64_t i = 0;
        widen_row(from, x, vocab);
        if (softcap > 0) soft_cap(x, vocab, softcap);
        vec most = splat(-INF);
        float top = -INF;
        bool nan = false;
        for (i = 0; i + LANES <= vocab; i += LANES) {
            const vec s = load(x + i);
            most = s > most ? s : most;
        }
        for (int lane = 0; lane < LANES; lane++) top = std::max(top, most[lane]);
        for (; i < vocab; i++) top = std::max(top, x[i]);
        for (i = 0; i < vocab; i++) nan |= x[i] != x[i];
        if (nan) top = std::numeric_limits<float>::quiet_NaN();
        const bool greedy = temperature == 0;
        int64_t chosen = 0;
        if (greedy && !nan) chosen = std::find(x, x + vocab, top) - x;
        for (i = 0; i < vocab; i++) x[i] -= top;
        vmsExp(vocab, x, weights, HIGH_ACCURACY);
        running_tile_sums(weights, vocab, tile, running);
        float log_normalizer;
        vmsLn(1, &running[tiles - 1], &log_normalizer, HIGH_ACCURACY);
        if (greedy) {
            token[row] = chosen;
            logprob[row] = -log_normalizer;
            sampling_logprob[row] = 0;
            return;
        }
        if (temperature != 1) {
            for (i = 0; i < vocab; i++) weights[i] = x[i] / temperature;
            vmsExp(vocab, weights, weights, HIGH_ACCURACY);
        }
        if (min_p > 0)
            for (i = 0; i < vocab; i++) weights[i] = weights[i] < min_p ? 0 : weights[i];
        if (temperature != 1 || min_p > 0)
            running_tile_sums(weights, vocab, tile, running);
        float threshold = uniform[row * uniform_stride] * running[tiles - 1], log_total;
        vmsLn(1, &running[tiles - 1], &log_total, HIGH_ACCURACY);
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

}  // namespace

// Philox4x32-10: the first word of each (key, counter), as a uniform: see `uniforms` in
// kernels/sample_token.py.
extern "C" void uniforms_f32(const int64_t *keys, const int64_t *index, const int64_t *positions,
                             int64_t rows, int64_t columns, float *uniform, int) {
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

// -- taking a token ------------------------------------------------------------------------------

namespace {

// The tables of a `ScoreAutomaton` and the registers of a `ScoreState`.
struct Automaton {
    int64_t *value, *count, *items, *n, *reason, *scores;  // items (B, max_n + 1), scores (B, max_n)
    int64_t max_n;
    const int16_t *table;  // (states, num_tokens): the next state, or BY_SYMBOL
    const int64_t *transitions, *symbols, *first, *last;
    int64_t num_tokens, score_min, score_max, saturated;
};
// As in kernels/extract_scores.py.
constexpr int64_t BY_SYMBOL = -1, ALPHABET = 258, DECIDED = 0;
constexpr int64_t CLOSE_BAD = 2, FORGET = 3;
constexpr int64_t UNDECIDED = -1, VALID = 0, COUNT = 2, RANGE = 3, NOT_AN_INTEGER = 4;

// Writes the outcome of a box that closes, or clears it.
void record(const Automaton &a, int64_t row, int64_t event, int64_t count) {
    const int64_t *items = a.items + row * (a.max_n + 1), n = a.n[row];
    const bool outside = std::any_of(
        items, items + n, [&](int64_t s) { return s < a.score_min || s > a.score_max; });
    const int64_t reason = event == FORGET      ? UNDECIDED
                           : event == CLOSE_BAD ? NOT_AN_INTEGER
                           : count != n         ? COUNT
                           : outside            ? RANGE
                                                : VALID;
    a.reason[row] = reason;
    for (int64_t i = 0; i < a.max_n; i++)
        a.scores[row * a.max_n + i] = i < n && reason == VALID ? items[i] : 0;
}

// The control state of a row after one more token.
int64_t advance(const Automaton &a, int64_t row, int64_t state, int64_t token) {
    const int64_t following = a.table[state * a.num_tokens + token];
    if (following != BY_SYMBOL) return following;
    int64_t value = a.value[row], count = a.count[row];
    for (int64_t place = a.first[token]; place < a.last[token]; place++) {
        const int64_t *edge = a.transitions + (state * ALPHABET + a.symbols[place]) * 6;
        state = edge[0];
        // The item's slot always holds the value so far: when it ends, it is there.
        a.items[row * (a.max_n + 1) + std::min(count, a.max_n)] = value;
        value = std::clamp(value * edge[1] + edge[2], -a.saturated, a.saturated);
        count = count * edge[3] + edge[4];
        if (edge[5]) record(a, row, edge[5], count);
    }
    a.value[row] = value;
    a.count[row] = count;
    return state;
}

}  // namespace

// `take_token`, on one thread: it is a few hundred samples at most.
extern "C" void take_token_f32(
    const int64_t *drawn, const float *logprob, const float *sampling_logprob, int64_t *token,
    int64_t *made, const int64_t *limit, const int64_t *slot, bool *finished, bool *ended,
    int64_t *tokens, float *logprobs, int64_t capacity, int64_t num_recorded,
    const int64_t *end_ids, int64_t num_ends, int64_t *position, int64_t *length, int64_t *cell,
    int64_t num_rows, int64_t *control, const Automaton *automaton, int64_t stop_at_box, int) {
    for (int64_t row = 0; row < num_rows; row++) {
        if (finished[row]) continue;
        const int64_t at = slot[row] * capacity + made[row];
        tokens[at] = token[row] = drawn[row];
        logprobs[at] = logprob[row];
        logprobs[num_recorded + at] = sampling_logprob[row];
        made[row]++;
        // An end token has no bytes, and must not reset the automaton as other special tokens do.
        ended[row] = std::find(end_ids, end_ids + num_ends, drawn[row]) != end_ids + num_ends;
        if (!ended[row]) control[row] = advance(*automaton, row, control[row], drawn[row]);
        finished[row] = ended[row] || made[row] >= limit[row] ||
                        (stop_at_box && control[row] == DECIDED);
        if (position) {
            position[row]++;
            length[row]++;
            cell[row]++;
        }
    }
}

// -- what Python calls, for float and bf16 -------------------------------------------------------

#define EXPORTS(T, S)                                                                              \
    extern "C" void rms_norm_##S(const T *x, int64_t x_t, int64_t x_a, const T *residual,          \
                                 const T *weight, T *y, T *total, int64_t rows, int64_t inner,     \
                                 int64_t size, float eps, int64_t plus_one, int threads) {         \
        rms_norm(x, x_t, x_a, residual, weight, y, total, rows, inner, size, eps, plus_one,        \
                 threads);                                                                         \
    }                                                                                              \
    extern "C" void rope_##S(const T *x, int64_t x_t, int64_t x_h, const float *cos,               \
                             const float *sin, T *y, int64_t tokens, int64_t heads, int64_t half,  \
                             int threads) {                                                        \
        rope(x, x_t, x_h, cos, sin, y, tokens, heads, half, threads);                              \
    }                                                                                              \
    extern "C" void gated_act_##S(const T *gate_up, int64_t stride, T *y, int64_t tokens,          \
                                  int64_t size, int64_t gelu, int threads) {                       \
        gated_act(gate_up, stride, y, tokens, size, gelu, threads);                                \
    }                                                                                              \
    extern "C" void write_kv_##S(const T *k, int64_t k_t, int64_t k_h, const T *v, int64_t v_t,    \
                                 int64_t v_h, T *k_cache, int64_t kc_h, int64_t kc_n, T *v_cache,  \
                                 int64_t vc_h, int64_t vc_n, const int64_t *slots, int64_t tokens, \
                                 int64_t heads, int64_t dim, int64_t v_dim, int threads) {         \
        write_kv(k, k_t, k_h, v, v_t, v_h, k_cache, kc_h, kc_n, v_cache, vc_h, vc_n, slots,        \
                 tokens, heads, dim, v_dim, threads);                                              \
    }                                                                                              \
    extern "C" void attend_items_##S(                                                              \
        const T *q, int64_t q_t, int64_t q_h, const T *k, int64_t k_h, int64_t k_n, const T *v,    \
        int64_t v_h, int64_t v_n, int64_t heads, int64_t kv_heads, int64_t dim, int64_t v_dim,     \
        const int64_t *positions, float scale, float softcap, int64_t window, float *o,            \
        float *lse, const Item *items, int64_t n, int threads) {                                   \
        attend_items(Attention<T>{q, k, v, q_t, q_h, k_h, k_n, v_h, v_n, heads, kv_heads, dim,     \
                                  v_dim, positions, scale, softcap, window, o, lse},               \
                     items, n, threads);                                                           \
    }                                                                                              \
    extern "C" void attend_suffixes_##S(                                                           \
        const T *q, int64_t q_t, int64_t q_h, const T *k, int64_t k_h, int64_t k_n, const T *v,    \
        int64_t v_h, int64_t v_n, int64_t heads, int64_t kv_heads, int64_t dim, int64_t v_dim,     \
        const int64_t *positions, float scale, float softcap, int64_t window, float *o,            \
        float *lse, const int64_t *row_of_slot, const int64_t *length, const int64_t *position,    \
        int64_t num_slots, int64_t base, int64_t capacity, int64_t max_split, int64_t num_splits,  \
        int threads) {                                                                             \
        attend_suffixes(Attention<T>{q, k, v, q_t, q_h, k_h, k_n, v_h, v_n, heads, kv_heads, dim,  \
                                     v_dim, positions, scale, softcap, window, o, lse},            \
                        row_of_slot, length, position, num_slots, base, capacity, max_split,       \
                        num_splits, threads);                                                      \
    }                                                                                              \
    extern "C" void merge_##S(const float *o, const float *lse, const int64_t *index,              \
                              int64_t queries, int64_t most, int64_t heads, int64_t v_dim, T *out, \
                              float *out_lse, int threads) {                                       \
        merge(o, lse, index, queries, most, heads, v_dim, out, out_lse, threads);                  \
    }                                                                                              \
    extern "C" void pack_##S(const T *weight, int64_t n, int64_t k, int64_t paired, T *packed,     \
                             int threads) {                                                        \
        pack(weight, n, k, paired, packed, threads);                                               \
    }                                                                                              \
    extern "C" void linear_##S(const T *x, int64_t m, int64_t k, const T *weight, int64_t n,       \
                               const T *bias, T *y, int threads) {                                 \
        linear<T>(x, m, k, weight, n, bias, y, threads);                                           \
    }                                                                                              \
    extern "C" void decode_##S(const Decoder *d, const int64_t *tokens, int64_t n,                 \
                               const int64_t *positions, const float *cos, const float *sin,       \
                               const int64_t *slots, const Suffix *suffix, float *o, float *lse,   \
                               T *out, int threads) {                                              \
        decode(*d, tokens, n, positions, cos, sin, slots, *suffix, o, lse, out, threads);          \
    }                                                                                              \
    extern "C" void sample_token_##S(const T *logits, int64_t batch, int64_t vocab,                \
                                     const float *uniform, int64_t uniform_stride,                 \
                                     float temperature, float min_p, float softcap, int64_t tile,  \
                                     int64_t *token, float *logprob, float *sampling_logprob,      \
                                     int threads) {                                                \
        sample_token(logits, batch, vocab, uniform, uniform_stride, temperature, min_p, softcap,   \
                     tile, token, logprob, sampling_logprob, threads);                             \
    }

EXPORTS(float, f32)
EXPORTS(bf16, bf16)

// Whether slots [0, tokens) are distinct and in [0, size).
extern "C" int distinct_slots(const int64_t *slots, int64_t tokens, int64_t size) {
    thread_local std::vector<int64_t> sorted;
    sorted.assign(slots, slots + tokens);
    std::sort(sorted.begin(), sorted.end());
    return !tokens || (sorted.front() >= 0 && sorted.back() < size &&
                       std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end());
}
extern "C" int panel_columns() { return COLUMNS; }
