// Accepting a drawn token: the records, the score automaton and the counts of each live sample.

#pragma once

#include <algorithm>
#include <cstdint>

#include "interface.h"

namespace quorum {

// The registers of a `ScoreState`, then the tables of a `ScoreAutomaton`: items (B, max_n + 1),
// scores (B, max_n), table (states, num_columns) of the next state or BY_SYMBOL.
#define QUORUM_AUTOMATON(F)                                                                        \
    F(int64_t *, value) F(int64_t *, count) F(int64_t *, items) F(int64_t *, n)                    \
    F(int64_t *, nonce) F(int64_t *, reason) F(int64_t *, scores) F(int64_t, max_n)                 \
    F(const int16_t *, table) F(const int64_t *, transitions) F(const int64_t *, symbols)          \
    F(const int64_t *, column) F(const int64_t *, first) F(const int64_t *, last)                  \
    F(int64_t, num_columns) F(int64_t, num_tokens) F(int64_t, score_min) F(int64_t, score_max)     \
    F(int64_t, saturated)
QUORUM_STRUCT(Automaton, QUORUM_AUTOMATON);

// As in kernels/extract_scores.py and kernels/score_grammar.py.
constexpr int64_t BY_SYMBOL = -1, ALPHABET = 258, EDGE = 7, DECIDED = 0;
constexpr int64_t CLOSE = 1, CLOSE_BAD = 2, FORGET = 3, CHECK_NONCE = 4, CHECK_ROOM = 5;
constexpr int64_t UNDECIDED = -1, VALID = 0, COUNT = 2, RANGE = 3, NOT_AN_INTEGER = 4;

// Writes the outcome of a box that closes, or clears it. Returns whether the event's check fails.
inline bool record(const Automaton &a, int64_t row, int64_t event, int64_t value, int64_t count) {
    const int64_t *items = a.items + row * (a.max_n + 1), n = a.n[row];
    if (event == CHECK_NONCE) return value != a.nonce[row];
    if (event == CHECK_ROOM && count < n) return false;
    const bool outside = std::any_of(items, items + n,
                                     [&](int64_t s) { return s < a.score_min || s > a.score_max; });
    const int64_t reason = event == FORGET                      ? UNDECIDED
                           : event == CLOSE_BAD                 ? NOT_AN_INTEGER
                           : count != n || event == CHECK_ROOM  ? COUNT
                           : outside                            ? RANGE
                                                                : VALID;
    a.reason[row] = reason;
    for (int64_t i = 0; i < a.max_n; i++)
        a.scores[row * a.max_n + i] = i < n && reason == VALID ? items[i] : 0;
    return event == CHECK_ROOM || (event == CLOSE && reason != VALID);
}

// The control state of a row after one more token.
inline int64_t advance(const Automaton &a, int64_t row, int64_t state, int64_t token) {
    const int64_t following = a.table[state * a.num_columns + a.column[token]];
    if (following != BY_SYMBOL) return following;
    int64_t value = a.value[row], count = a.count[row];
    for (int64_t place = a.first[token]; place < a.last[token]; place++) {
        const int64_t *edge = a.transitions + (state * ALPHABET + a.symbols[place]) * EDGE;
        state = edge[0];
        // The item's slot always holds the value so far: when it ends, it is there.
        a.items[row * (a.max_n + 1) + std::min(count, a.max_n)] = value;
        value = std::clamp(value * edge[1] + edge[2], -a.saturated, a.saturated);
        count = count * edge[3] + edge[4];
        if (edge[5] && record(a, row, edge[5], value, count)) state = edge[6];
    }
    a.value[row] = value;
    a.count[row] = count;
    return state;
}

// On one thread: it is a few hundred samples at most.
inline void accept_token(const int64_t *drawn, const float *logprob, const float *sampling_logprob,
                         const float *expected, int64_t *token, int64_t *made, const int64_t *limit, const int64_t *slot,
                         bool *finished, bool *ended, int64_t *tokens, float *logprobs,
                         float *expected_scores, int64_t capacity, int64_t num_recorded, const int64_t *end_ids,
                         int64_t num_ends, int64_t *position, int64_t *length, int64_t *cell,
                         const int64_t *blocks, int64_t stride, int64_t max_split,
                         int64_t num_rows, int64_t *control, const Automaton *automaton,
                         int64_t stop_at_box, int64_t) {
    for (int64_t row = 0; row < num_rows; row++) {
        if (finished[row]) continue;
        const int64_t at = slot[row] * capacity + made[row];
        tokens[at] = token[row] = drawn[row];
        logprobs[at] = logprob[row];
        logprobs[num_recorded + at] = sampling_logprob[row];
        if (expected) expected_scores[at] = expected[row];
        made[row]++;
        // An end token has no bytes, and must not reset the automaton as other special tokens do.
        ended[row] = std::find(end_ids, end_ids + num_ends, drawn[row]) != end_ids + num_ends;
        if (!ended[row]) control[row] = advance(*automaton, row, control[row], drawn[row]);
        finished[row] =
            ended[row] || made[row] >= limit[row] || (stop_at_box && control[row] == DECIDED);
        if (position) {
            const int64_t key = length[row]++;
            position[row]++;
            cell[row] = blocks[row * stride + key / max_split] + key % max_split;
        }
    }
}

// Whether slots [0, tokens) are distinct and in [0, size): 1 or 0 to `result`.
inline void distinct_slots(const int64_t *slots, int64_t tokens, int64_t size, int64_t *result,
                           int64_t) {
    thread_local std::vector<int64_t> sorted;
    sorted.assign(slots, slots + tokens);
    std::sort(sorted.begin(), sorted.end());
    *result = !tokens || (sorted.front() >= 0 && sorted.back() < size &&
                          std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end());
}

}  // namespace quorum
