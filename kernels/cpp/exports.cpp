// What Python calls: every operation, for float32 and bfloat16.

#include "attention_backward.h"
#include "interface.h"
#include "linear.h"
#include "moe.h"
#include "sampling.h"
#include "scores.h"

namespace quorum {

template <class T>
void attend_tiles_of(const AttentionArguments *a, const Tile *tiles, int64_t n, int64_t threads) {
    attend_tiles(Attention<T>(*a), tiles, n, threads);
}
template <class T>
void attend_suffixes_of(const AttentionArguments *a, const Suffixes *suffixes, int64_t threads) {
    attend_suffixes(Attention<T>(*a), *suffixes, threads);
}
template <class T, class W>
void linear_rows_of(const T *x, int64_t m, int64_t k, const W *weight, int64_t n, const T *bias,
                    T *y, int64_t threads) {
    linear<T, W>(x, m, k, weight, n, bias, y, threads);
}
template <class T>
void row_dots_of(const T *x, int64_t rows, int64_t size, const float *weight, float *out,
                 int64_t threads) {
    row_dots<T>(x, rows, size, weight, out, threads);
}
// y = f(x) for n numbers, f 0: exp, 1: log, 2: tanh.
inline void elementary(const float *x, float *y, int64_t n, int64_t f, int64_t threads) {
    parallel_blocks(n, 4096, threads, [&](int64_t first, int64_t last) {
        const auto map = [&](auto function) {
            map_row(last - first, y + first, function, x + first);
        };
        if (f == 0) map([](vec v) { return exp(v); });
        if (f == 1) map([](vec v) { return log(v); });
        if (f == 2) map([](vec v) { return tanh(v); });
    });
}
inline void panel_columns(int64_t *columns, int64_t) { *columns = COLUMNS; }

template <class T, class W>
bool add_products(const std::string &suffix) {
    return add_function("pack" + suffix, pack<W>) &&
           add_function("linear" + suffix, linear_rows_of<T, W>) &&
           add_function("route" + suffix, route<T, W>) &&
           add_function("moe" + suffix, moe<T, W>);
}
template <class T>
bool add_all(const std::string &suffix) {
    return add_function("rms_norm" + suffix, rms_norm<T>) &&
           add_function("rope" + suffix, rope<T>) &&
           add_function("gated_act" + suffix, gated_act<T>) &&
           add_function("write_kv" + suffix, write_kv<T>) &&
           add_function("attend_tiles" + suffix, attend_tiles_of<T>) &&
           add_function("attend_suffixes" + suffix, attend_suffixes_of<T>) &&
           add_function("attend_backward" + suffix, attend_backward<T>) &&
           add_function("merge" + suffix, merge<T>) &&
           add_function("row_dots" + suffix, row_dots_of<T>) &&
           add_function("sample_token" + suffix, sample_token<T>) &&
           add_function("expected_score" + suffix, expected_score<T>);
}
static const bool described =
    add_all<float>("_f32") && add_all<bf16>("_bf16") && add_products<float, float>("_f32") &&
    add_products<bf16, bf16>("_bf16") && add_function("uniforms_f32", uniforms) &&
    add_function("rope_cos_sin_f32", rope_cos_sin) && add_function("elementary_f32", elementary) &&
    add_function("accept_token_f32", accept_token) &&
    add_function("distinct_slots_f32", distinct_slots) &&
    add_function("panel_columns_f32", panel_columns) &&
    add_struct("AttentionArguments", sizeof(AttentionArguments), AttentionArguments::describe()) &&
    add_struct("Routing", sizeof(Routing), Routing::describe()) &&
    add_struct("Gradients", sizeof(Gradients), Gradients::describe()) &&
    add_struct("Suffixes", sizeof(Suffixes), Suffixes::describe()) &&
    add_struct("Automaton", sizeof(Automaton), Automaton::describe());
#ifdef QUORUM_DOTS
static const bool fast = has_dots() && add_products<bf16, bf16_pair>("_bf16_dots");
#endif

}  // namespace quorum

// All lines of the interface (see interface.h), or the first so many bytes of them; returns how
// many there are.
extern "C" [[gnu::visibility("default")]] int64_t quorum_interface(char *text, int64_t size) {
    std::string all;
    for (const std::string &line : quorum::interface_lines()) all += line + "\n";
    if (size > 0) std::memcpy(text, all.data(), std::min<int64_t>(size, all.size()));
    return (int64_t)all.size();
}
