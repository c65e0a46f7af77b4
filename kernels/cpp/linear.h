// Linear layers over packed weights: y = x W^T + bias, or act(x W0^T) * (x W1^T).
//
// A sum adds BLOCK_TERMS terms in index order, each with one fused multiply-add, then the sums of
// such blocks in order: one chain over thousands of terms would round off several times as much.
// Weights are packed in panels of COLUMNS columns, step by step; rows are laid out in tiles of up
// to ROWS rows, step by step. A block of a panel stays in the first cache for all tiles. A step is
// a term of every sum; with bf16_pair it is two, which one instruction multiplies and adds.

#pragma once

#include "elementwise.h"

namespace quorum {

constexpr int COLUMNS = 2 * LANES;
constexpr int64_t BLOCK_TERMS = 256;

// One term of a panel. In bfloat16 a 32-bit word holds columns i and i + LANES, so that one load
// gives both vectors.
inline void panel(const float *w, vec &a, vec &b) {
    a = load(w);
    b = load(w + LANES);
}
inline void panel(const bf16 *w, vec &a, vec &b) {
    const ivec both = read<ivec>(w);
    a = (vec)(both << 16);
    b = (vec)(both & (int32_t)0xFFFF0000);
}

// weight: (n, k) to panels; k is even where terms go in pairs. With `paired` it holds two matrices
// of n / 2 rows, and a panel LANES columns of each: gate and up.
template <class W>
void pack(const W *weight, int64_t n, int64_t k, int64_t paired, W *packed, int64_t threads) {
    constexpr int64_t step = STEP_TERMS<W>;
    const int64_t apart = paired ? n / 2 : LANES, across = paired ? LANES : COLUMNS;
    const int64_t end = paired ? n / 2 : n;
    parallel((end + across - 1) / across, 1, threads, [&](int64_t p) {
        for (int64_t c = 0; c < COLUMNS; c++) {
            const int64_t of_first = p * across + c % LANES;
            const int64_t column = of_first + c / LANES * apart;
            const bool exists = paired ? of_first < end : column < end;
            const bool halves = sizeof(W) == 2 && step == 1;
            const int64_t place = halves ? c % LANES * 2 + c / LANES : c * step;
            for (int64_t i = 0; i < k; i++)
                packed[(p * k + i / step * step) * COLUMNS + place + i % step] =
                    exists ? weight[column * k + i] : W{};
        }
    });
}

// Numbers of a packed weight (n, k), of a pair with n that of one.
inline int64_t packed_size(int64_t n, int64_t k, bool paired = false) {
    const int64_t across = paired ? LANES : COLUMNS;
    return (n + across - 1) / across * COLUMNS * k;
}

// Bytes that are used next, fetched into the second cache a few at a time.
struct Prefetch {
    const char *from = nullptr;
    int64_t bytes = 0;  // a step
};

template <int M>
inline void add_sums(const vec (&sum)[M][2], bool first, float *sums) {
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++) {
            float *total = sums + m * COLUMNS + v * LANES;
            store(total, first ? sum[m][v] : load(total) + sum[m][v]);
        }
}

// sums (M, COLUMNS) += a block of steps of M rows, laid out step by step in x (steps, M), times a
// panel. The first block starts the sums.
template <int M, class W>
[[gnu::noinline]] void linear_tile(const float *x, const W *weight, int64_t steps, bool first,
                                   Prefetch ahead, float *sums) {
    vec sum[M][2];
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = vec{};
    const auto add = [&](int64_t i) {
        vec a, b;
        panel(weight + i * COLUMNS, a, b);
        for (int m = 0; m < M; m++) {
            const vec by = splat(x[i * M + m]);
            sum[m][0] = fma(by, a, sum[m][0]);
            sum[m][1] = fma(by, b, sum[m][1]);
        }
    };
    int64_t i = 0;
    for (; i + 4 <= steps; i += 4) {
        for (int64_t byte = 0; byte < 4 * ahead.bytes; byte += 64)
            __builtin_prefetch(ahead.from + i * ahead.bytes + byte, 0, 2);
        for (int j = 0; j < 4; j++) add(i + j);
    }
    for (; i < steps; i++) add(i);
    add_sums(sum, first, sums);
}
#ifdef QUORUM_DOTS
template <int M>
[[gnu::noinline]] QUORUM_DOTS void linear_tile(const float *x, const bf16_pair *weight,
                                               int64_t steps, bool first, Prefetch ahead,
                                               float *sums) {
    vec sum[M][2];
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = vec{};
    for (int64_t i = 0; i < steps; i++) {
        if (i % 4 == 0)
            for (int64_t byte = 0; byte < 4 * ahead.bytes; byte += 64)
                __builtin_prefetch(ahead.from + i * ahead.bytes + byte, 0, 2);
        const vec a = read<vec>(weight + i * 2 * COLUMNS);
        const vec b = read<vec>(weight + i * 2 * COLUMNS + 2 * LANES);
        for (int m = 0; m < M; m++) {
            const vec by = splat(x[i * M + m]);
            sum[m][0] = add_dots(sum[m][0], by, a);
            sum[m][1] = add_dots(sum[m][1], by, b);
        }
    }
    add_sums(sum, first, sums);
}
#endif

template <int M, class W>
void linear_rows(int64_t rows, const float *x, const W *weight, int64_t steps, bool first,
                 Prefetch ahead, float *sums) {
    if constexpr (M > 0) {
        if (rows == M) return linear_tile<M>(x, weight, steps, first, ahead, sums);
        linear_rows<M - 1>(rows, x, weight, steps, first, ahead, sums);
    }
}

// Rows of a linear layer's input, laid out for tiles of weights W: tile by tile, step by step.
template <class W>
struct RowTiles {
    int64_t m, k, tile;  // rows, steps, rows of a tile
    float *data;
    std::vector<float> storage;

    // Puts m rows of so many terms at `to`.
    void place(int64_t rows, int64_t terms, float *to) {
        m = rows, k = terms / STEP_TERMS<W>, data = to;
        const int64_t tiles = (m + ROWS - 1) / ROWS;
        tile = tiles ? (m + tiles - 1) / tiles : 1;
    }
    // Makes room for them.
    void resize(int64_t rows, int64_t terms) { place(rows, terms, room(storage, rows * terms)); }
    // Fills it: row_of(t) gives row t, which stays until the last of its tile is there.
    template <class F>
    void fill(F row_of, int64_t threads) {
        parallel((m + tile - 1) / tile, 1, threads, [&](int64_t task) {
            const int64_t first = task * tile, here = std::min(tile, m - first);
            decltype(row_of(0)) rows[ROWS];
            for (int64_t r = 0; r < here; r++) rows[r] = row_of(first + r);
            for (int64_t r = 0; r < here; r += LANES)
                lay_out(
                    [&](int64_t i) {
                        // A pair of bfloat16 is moved as a float.
                        if constexpr (IN_PAIRS<W>) return (const float *)rows[r + i];
                        else return rows[r + i];
                    },
                    std::min<int64_t>(here - r, LANES), k, data + first * k + r, here);
        });
    }
};

// Writes one row of a panel's sums: `columns` columns of y.
template <class Y>
inline void finish_row(const float *sums, const float *bias, Activation activation, Y *y,
                       int64_t columns) {
    const auto write = [&](int64_t first, vec v) {
        if (columns - first >= LANES) store(y + first, v);
        else if (columns > first) store_first(y + first, v, columns - first);
    };
    const vec a = load(sums), b = load(sums + LANES);
    if (activation) {
        write(0, (activation == GELU ? gelu_tanh(a) : silu(a)) * b);
    } else {
        write(0, bias ? a + load(bias) : a);
        write(LANES, bias ? b + load(bias + LANES) : b);
    }
}

// Rows [first, last) of one panel's columns of y, rows y_t apart: x is laid out in tiles of `tile`
// rows of k steps, weight and bias are the panel's.
template <class W, class B, class Y>
inline void linear_panel(const float *x, int64_t k, int64_t tile, int64_t first, int64_t last,
                         const W *weight, const B *bias, Y *y, int64_t y_t, int64_t columns,
                         Activation activation) {
    constexpr int64_t step = STEP_TERMS<W>, block = BLOCK_TERMS / step;
    thread_local std::vector<float> storage;
    float *sums = room(storage, (last - first) * COLUMNS), wide_bias[COLUMNS] = {};
    if (bias) widen_row(bias, wide_bias, columns);
    Prefetch ahead{(const char *)(weight + COLUMNS * step * k),
                   COLUMNS * step * (int64_t)sizeof(W) / ((last - first + tile - 1) / tile)};
    for (int64_t start = 0; start < k; start += block) {
        const int64_t steps = std::min(block, k - start);
        for (int64_t t = first; t < last; t += tile) {
            const int64_t here = std::min(tile, last - t);
            linear_rows<ROWS>(here, x + t * k + start * here, weight + start * step * COLUMNS,
                              steps, start == 0, ahead, sums + (t - first) * COLUMNS);
            ahead.from += ahead.bytes * steps;
        }
    }
    for (int64_t t = first; t < last; t++)
        finish_row(sums + (t - first) * COLUMNS, bias ? wide_bias : nullptr, activation,
                   y + t * y_t, columns);
}

// y (m, n) of a packed weight (n, k); with an activation the weight is a pair and n that of one.
template <class W, class B, class Y>
void linear(const RowTiles<W> &x, const W *weight, int64_t n, const B *bias, Y *y, int64_t threads,
            Activation activation = NONE) {
    const int64_t m = x.m, k = x.k, tile = x.tile;
    if (!m) return;
    const int64_t across = activation ? LANES : COLUMNS;  // columns that a panel gives
    const int64_t panels = (n + across - 1) / across, tiles = (m + tile - 1) / tile;
    // Rows that stay in the second cache while the panels pass by, and fewer where there are so few
    // panels that the last ones would keep one thread busy for long.
    const int64_t fit = std::max<int64_t>(1, (3 << 17) / (4 * k * tile));
    const int64_t least = threads > 1 ? (8 * threads + panels - 1) / panels : 1;
    const int64_t block = std::min(fit, (tiles + least - 1) / least) * tile;
    const int64_t blocks = (m + block - 1) / block;
    // Neighbouring panels to one thread, so that it finds what it fetched ahead; several for each.
    const int64_t grain = std::clamp<int64_t>(blocks * panels / (4 * threads), 1, 8);
    const float *rows = x.data;
    parallel(blocks * panels, grain, threads, [&](int64_t task) {
        const int64_t p = task % panels, first = task / panels * block;
        linear_panel(rows, k, tile, first, std::min(m, first + block),
                     weight + p * COLUMNS * STEP_TERMS<W> * k,
                     bias ? bias + p * across : nullptr, y + p * across, n,
                     std::min<int64_t>(across, n - p * across), activation);
    });
}
template <class T, class W>
void linear(const T *x, int64_t m, int64_t k, const W *weight, int64_t n, const T *bias, T *y,
            int64_t threads) {
    thread_local RowTiles<W> row_tiles;
    row_tiles.resize(m, k);
    row_tiles.fill([&](int64_t t) { return x + t * k; }, threads);
    linear(row_tiles, weight, n, bias, y, threads);
}

// One of several linear layers whose weights have one shape: m rows, a packed weight, and where the
// results go, rows y_t apart.
template <class T, class W>
struct Product {
    int64_t m;
    const W *weight;
    T *y;
    int64_t y_t;
};

// Layers [0, count) side by side, each as `linear` has it: product_of(b) is layer b, row_of(b, i)
// its row i of k numbers.
template <class T, class W, class P, class R>
void linear_many(int64_t count, int64_t k, int64_t n, P product_of, R row_of, int64_t threads,
                 Activation activation = NONE) {
    thread_local std::vector<RowTiles<W>> all_tiles;
    thread_local std::vector<float> storage;
    all_tiles.resize(std::max<size_t>(all_tiles.size(), count));
    RowTiles<W> *tiles = all_tiles.data();
    int64_t rows = 0;
    for (int64_t b = 0; b < count; b++) rows += product_of(b).m;
    float *data = room(storage, rows * k);
    for (int64_t b = 0; b < count; data += tiles[b++].m * k)
        tiles[b].place(product_of(b).m, k, data);
    parallel(count, 1, threads, [&](int64_t b) {
        tiles[b].fill([&](int64_t i) { return row_of(b, i); }, 1);
    });
    const int64_t across = activation ? LANES : COLUMNS, panels = (n + across - 1) / across;
    const int64_t grain = std::clamp<int64_t>(count * panels / (4 * threads), 1, 8);
    parallel(count * panels, grain, threads, [&](int64_t task) {
        const int64_t b = task / panels, p = task % panels, tile = tiles[b].tile;
        const Product<T, W> product = product_of(b);
        const int64_t steps = tiles[b].k;
        const int64_t block = std::max<int64_t>(1, (3 << 17) / (4 * steps * tile)) * tile;
        for (int64_t first = 0; first < product.m; first += block)
            linear_panel<W, T>(tiles[b].data, steps, tile, first,
                               std::min(product.m, first + block),
                               product.weight + p * COLUMNS * k, nullptr, product.y + p * across,
                               product.y_t, std::min<int64_t>(across, n - p * across), activation);
    });
}

// out[r] = x[r] . weight, summed over 16 lanes: rows of any number have the same bits. weight: as
// float32.
template <class T>
void row_dots(const T *x, int64_t rows, int64_t size, const float *weight, float *out,
              int64_t threads) {
    parallel(rows, std::max<int64_t>(1, 16384 / size), threads, [&](int64_t row) {
        LaneSums sums;
        const T *from = x + row * size;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) sums.add(i, load(from + i) * load(weight + i));
        if (i < size)
            sums.add(i, load_first(from + i, size - i) * load_first(weight + i, size - i));
        out[row] = sums.total();
    });
}

}  // namespace quorum
