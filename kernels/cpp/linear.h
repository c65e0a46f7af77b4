// Linear layers over packed weights: y = x W^T + bias, or act(x W0^T) * (x W1^T).
//
// A sum adds BLOCK_TERMS terms in index order, each with one fused multiply-add, then the sums of
// such blocks in order: one chain over thousands of terms would round off several times as much.
// Weights are packed in panels of COLUMNS columns, term by term; rows are laid out in tiles of up
// to ROWS rows, term by term. A block of a panel stays in the first cache for all tiles.

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

// weight: (n, k) to panels. With `paired` it holds two matrices of n / 2 rows, and a panel LANES
// columns of each: gate and up.
template <class T>
void pack(const T *weight, int64_t n, int64_t k, int64_t paired, T *packed, int64_t threads) {
    const int64_t apart = paired ? n / 2 : LANES, across = paired ? LANES : COLUMNS;
    const int64_t end = paired ? n / 2 : n;
    parallel((end + across - 1) / across, 1, threads, [&](int64_t p) {
        for (int64_t c = 0; c < COLUMNS; c++) {
            const int64_t of_first = p * across + c % LANES;
            const int64_t column = of_first + c / LANES * apart;
            const bool exists = paired ? of_first < end : column < end;
            const int64_t place = sizeof(T) == 4 ? c : c % LANES * 2 + c / LANES;
            for (int64_t i = 0; i < k; i++)
                packed[(p * k + i) * COLUMNS + place] = exists ? weight[column * k + i] : T{};
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
    int64_t step = 0;  // bytes a term
};

// sums (M, COLUMNS) += a block of terms of M rows, laid out term by term in x (terms, M), times a
// panel. The first block starts the sums.
template <int M, class T>
[[gnu::noinline]] void linear_tile(const float *x, const T *weight, int64_t terms, bool first,
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
    for (; i + 4 <= terms; i += 4) {
        for (int64_t byte = 0; byte < 4 * ahead.step; byte += 64)
            __builtin_prefetch(ahead.from + i * ahead.step + byte, 0, 2);
        for (int j = 0; j < 4; j++) add(i + j);
    }
    for (; i < terms; i++) add(i);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++) {
            float *total = sums + m * COLUMNS + v * LANES;
            store(total, first ? sum[m][v] : load(total) + sum[m][v]);
        }
}

template <int M, class T>
void linear_rows(int64_t rows, const float *x, const T *weight, int64_t terms, bool first,
                 Prefetch ahead, float *sums) {
    if constexpr (M > 0) {
        if (rows == M) return linear_tile<M>(x, weight, terms, first, ahead, sums);
        linear_rows<M - 1>(rows, x, weight, terms, first, ahead, sums);
    }
}

// Rows of a linear layer's input, laid out for its tiles: tile by tile, term by term.
struct RowTiles {
    int64_t m, k, tile;
    float *data;
    std::vector<float> storage;

    // Puts m rows of k numbers at `to`.
    void place(int64_t rows, int64_t terms, float *to) {
        m = rows, k = terms, data = to;
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
                lay_out([&](int64_t i) { return rows[r + i]; }, std::min<int64_t>(here - r, LANES),
                        k, data + first * k + r, here);
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
// rows of k numbers, weight and bias are the panel's.
template <class T, class Y>
inline void linear_panel(const float *x, int64_t k, int64_t tile, int64_t first, int64_t last,
                         const T *weight, const T *bias, Y *y, int64_t y_t, int64_t columns,
                         Activation activation) {
    thread_local std::vector<float> storage;
    float *sums = room(storage, (last - first) * COLUMNS), wide_bias[COLUMNS] = {};
    if (bias) widen_row(bias, wide_bias, columns);
    Prefetch ahead{(const char *)(weight + COLUMNS * k),
                   COLUMNS * (int64_t)sizeof(T) / ((last - first + tile - 1) / tile)};
    for (int64_t start = 0; start < k; start += BLOCK_TERMS) {
        const int64_t terms = std::min(BLOCK_TERMS, k - start);
        for (int64_t t = first; t < last; t += tile) {
            const int64_t here = std::min(tile, last - t);
            linear_rows<ROWS>(here, x + t * k + start * here, weight + start * COLUMNS, terms,
                              start == 0, ahead, sums + (t - first) * COLUMNS);
            ahead.from += ahead.step * terms;
        }
    }
    for (int64_t t = first; t < last; t++)
        finish_row(sums + (t - first) * COLUMNS, bias ? wide_bias : nullptr, activation,
                   y + t * y_t, columns);
}

// y (m, n) of a packed weight (n, k); with an activation the weight is a pair and n that of one.
template <class T, class Y>
void linear(const RowTiles &x, const T *weight, int64_t n, const T *bias, Y *y, int64_t threads,
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
        linear_panel(rows, k, tile, first, std::min(m, first + block), weight + p * COLUMNS * k,
                     bias ? bias + p * across : nullptr, y + p * across, n,
                     std::min<int64_t>(across, n - p * across), activation);
    });
}
template <class T>
void linear(const T *x, int64_t m, int64_t k, const T *weight, int64_t n, const T *bias, T *y,
            int64_t threads) {
    thread_local RowTiles row_tiles;
    row_tiles.resize(m, k);
    row_tiles.fill([&](int64_t t) { return x + t * k; }, threads);
    linear(row_tiles, weight, n, bias, y, threads);
}

// One of several linear layers whose weights have one shape: m rows, a packed weight, and where the
// results go, rows y_t apart.
template <class T>
struct Product {
    int64_t m;
    const T *weight;
    T *y;
    int64_t y_t;
};

// Layers [0, count) side by side, each as `linear` has it: product_of(b) is layer b, row_of(b, i)
// its row i of k numbers.
template <class T, class P, class R>
void linear_many(int64_t count, int64_t k, int64_t n, P product_of, R row_of, int64_t threads,
                 Activation activation = NONE) {
    thread_local std::vector<RowTiles> all_tiles;
    thread_local std::vector<float> storage;
    all_tiles.resize(std::max<size_t>(all_tiles.size(), count));
    RowTiles *tiles = all_tiles.data();
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
        const Product<T> product = product_of(b);
        const int64_t block = std::max<int64_t>(1, (3 << 17) / (4 * k * tile)) * tile;
        for (int64_t first = 0; first < product.m; first += block)
            linear_panel<T>(tiles[b].data, k, tile, first, std::min(product.m, first + block),
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
