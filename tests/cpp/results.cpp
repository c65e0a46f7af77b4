// Prints a hash of the results of operations in float32 and bfloat16, which is the same for every
// instruction set. Before that, several threads call them at once, each on several threads of the
// pool: every result has to be that of one thread alone. Run by tests/test_cpp_programs.py.

#include <cstdio>
#include <cstdlib>
#include <thread>

#include "../../kernels/cpp/attention.h"
#include "../../kernels/cpp/linear.h"
#include "../../kernels/cpp/sampling.h"

using namespace quorum;

namespace {

std::vector<float> numbers(int64_t n, int64_t step) {
    std::vector<float> x(n);
    for (int64_t i = 0; i < n; i++) x[i] = (float)((i * step) % 251 - 125) / 97;
    return x;
}

template <class T>
std::vector<T> narrowed(const std::vector<float> &x) {
    std::vector<T> y(x.size());
    narrow_row(x.data(), y.data(), (int64_t)x.size());
    return y;
}
template <class T>
void append(std::vector<float> &all, const std::vector<T> &x) {
    for (T value : x) all.push_back(widen(value));
}

// A norm, an activation, linear layers, attention of few and of many query rows with and without a
// window and a soft-cap, its merge, and the drawing of tokens.
template <class T>
void compute(int64_t seed, int64_t threads, std::vector<float> &all) {
    const int64_t rows = 37, terms = 300, columns = 70, heads = 4, kv_heads = 2, dim = 32,
                  keys = 90;
    const auto x = narrowed<T>(numbers(rows * terms, 7 + seed));
    const auto weight = narrowed<T>(numbers(columns * terms, 31));
    const auto scale = narrowed<T>(numbers(terms, 5));
    std::vector<T> normed(rows * terms), active(rows * terms / 2), y(rows * columns);
    rms_norm<T>(x.data(), terms, terms, nullptr, scale.data(), normed.data(), nullptr, rows, 1,
                terms, 1e-6f, 0, threads);
    std::vector<T> panels((columns + COLUMNS - 1) / COLUMNS * COLUMNS * terms);
    pack<T>(weight.data(), columns, terms, 0, panels.data(), threads);
    linear<T>(normed.data(), rows, terms, panels.data(), columns, nullptr, y.data(), threads);
    append(all, normed);
    append(all, y);
    for (int64_t gelu : {0, 1}) {
        gated_act<T>(x.data(), terms, active.data(), rows, terms / 2, gelu, threads);
        append(all, active);
    }
    const auto q = narrowed<T>(numbers(rows * heads * dim, 13 + seed));
    const auto cache = narrowed<T>(numbers(kv_heads * keys * dim, 11 + seed));
    std::vector<int64_t> positions(rows), index(rows);
    for (int64_t t = 0; t < rows; t++) positions[t] = 40 + 2 * t, index[t] = t;
    for (int64_t queries : {1, 2, 3, 20})
        for (float softcap : {0.0f, 5.0f})
            for (int64_t window : {0, 30}) {
                std::vector<float> o(rows * heads * dim), lse(rows * heads),
                    merged_lse(rows * heads);
                std::vector<T> merged(rows * heads * dim);
                const AttentionArguments a{
                    q.data(),  cache.data(),     cache.data(), heads * dim, dim,      keys * dim,
                    dim,       keys * dim,       dim,          heads,       kv_heads, dim,
                    dim,       positions.data(), 0.2f,         softcap,     window,   o.data(),
                    lse.data()};
                std::vector<Tile> tiles;
                for (int64_t first = 0; first < rows; first += queries)
                    tiles.push_back({first, std::min(queries, rows - first), 0, keys, 0, first});
                attend_tiles(Attention<T>(a), tiles.data(), (int64_t)tiles.size(), threads);
                merge<T>(o.data(), lse.data(), index.data(), rows, 1, heads, dim, merged.data(),
                         merged_lse.data(), threads);
                append(all, o);
                append(all, merged);
                append(all, merged_lse);
            }
    const auto uniform = numbers(rows, 3);
    std::vector<float> chance(rows), logprob(rows), sampling_logprob(rows);
    for (int64_t r = 0; r < rows; r++) chance[r] = (uniform[r] + 2) / 4;
    std::vector<int64_t> token(rows);
    for (int64_t top_k : {0, 9})
        for (float top_p : {1.0f, 0.8f}) {
            sample_token<T>(y.data(), rows, columns, chance.data(), 1, 0.7f, top_k, top_p, 0.01f,
                            30, 32, token.data(), logprob.data(), sampling_logprob.data(), threads);
            for (int64_t t : token) all.push_back((float)t);
            append(all, logprob);
            append(all, sampling_logprob);
        }
}

std::vector<float> compute(int64_t seed, int64_t threads) {
    std::vector<float> all;
    compute<float>(seed, threads, all);
    compute<bf16>(seed, threads, all);
    return all;
}

// FNV-1a of the bits.
uint64_t hash_of(const std::vector<float> &x) {
    uint64_t hash = 0xCBF29CE484222325;
    for (float value : x) hash = (hash ^ read<uint32_t>(&value)) * 0x100000001B3;
    return hash;
}

}  // namespace

// rounds: how often each thread repeats its computation.
int main(int argc, char **argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 3;
    std::vector<std::vector<float>> alone;
    for (int64_t seed = 0; seed < 3; seed++) alone.push_back(compute(seed, 1));
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int64_t seed = 0; seed < 3; seed++)
        callers.emplace_back([&, seed] {
            for (int round = 0; round < rounds; round++) {
                const auto found = compute(seed, 1 + round % 4);
                wrong += std::memcmp(found.data(), alone[seed].data(), found.size() * 4) != 0;
            }
        });
    for (auto &caller : callers) caller.join();
    std::printf("%016llx, %d wrong\n", (unsigned long long)hash_of(alone[0]), wrong.load());
    return wrong != 0;
}
