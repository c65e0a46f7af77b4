"""Read the scores out of generated tokens: an automaton over their bytes, one token at a time.

Dimension letters: B rows (live samples), V vocabulary, C control states, K columns.

`kernels/score_grammar.py` has the language, its parser, and its table over (state, symbol): the
next state and the symbol's action on the registers (item value, item count, event). Symbols are the
256 bytes, RESET (a special token) and PAD. A special token has no bytes: the text starts anew after
it, unless the row is decided. A second table has the next state of whole tokens without an action,
which are nearly all: a decode step is one look-up, and only rows inside a box or at a nonce walk
their token symbol by symbol. Tokens that lead to the same states share a column of it.

`advance_rows` is that step for a block of rows in a Triton kernel; `ScoreAutomaton.advance_ref` is
the same step in torch. Neither un-permutes scores or votes, and neither sees the prompt.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import to_device
from kernels.score_grammar import (
    ALPHABET,
    BOUND,
    CHECK_NONCE,
    CHECK_ROOM,
    CLOSE,
    CLOSE_BAD,
    FORGET,
    PAD,
    RESET,
    Outcome,
    Reason,
    ScoreRules,
    parse_scores,
    transitions,
)
from kernels.target import Target

_DECIDED = 0  # control state
_EDGE = 7  # numbers of a transition
_BY_SYMBOL = -1  # in the token table: the token has an action


def extract_scores_ref(
    token_bytes: Sequence[bytes],
    special_ids: Collection[int],
    tokens: Sequence[int],
    n: int,
    rules: ScoreRules,
    finished: bool,
    nonce: int | None = None,
) -> Outcome:
    """The specification on the tokens of one row: `parse_scores` between special tokens."""
    text = bytearray()
    for token in tokens:
        if token not in special_ids:
            text += token_bytes[token]
            continue
        reason, _ = parse_scores(bytes(text), n, rules, True, nonce)
        if rules.first and reason != Reason.MISSING:
            break
        text.clear()
    return parse_scores(bytes(text), n, rules, finished, nonce)


# Triton takes no other globals.
DECIDED = tl.constexpr(_DECIDED)
_SYMBOLS, _NUMBERS = tl.constexpr(ALPHABET), tl.constexpr(_EDGE)
_WALKS = tl.constexpr(_BY_SYMBOL)
_CLOSES, _CLOSES_BAD = tl.constexpr(CLOSE), tl.constexpr(CLOSE_BAD)
_FORGETS, _CHECKS_NONCE = tl.constexpr(FORGET), tl.constexpr(CHECK_NONCE)
_CHECKS_ROOM = tl.constexpr(CHECK_ROOM)
_UNDECIDED, _VALID = tl.constexpr(int(Reason.UNDECIDED)), tl.constexpr(int(Reason.VALID))
_WRONG_COUNT, _OUTSIDE = tl.constexpr(int(Reason.COUNT)), tl.constexpr(int(Reason.RANGE))
_NO_INTEGER = tl.constexpr(int(Reason.NOT_AN_INTEGER))


@triton.jit
def _record_rows(
    event, value, count, row,
    items_ptr, n_ptr, nonce_ptr, reason_ptr, scores_ptr, max_n, score_min, score_max,
):  # fmt: skip
    """Write the outcome of boxes that close, and clear that of rows that forget. Returns whose
    check has failed."""
    n = tl.load(n_ptr + row, mask=event > 0, other=0)  # (ROWS,)
    is_full = (event == _CHECKS_ROOM) & (count >= n)
    nonce = tl.load(nonce_ptr + row, mask=event == _CHECKS_NONCE, other=0)
    changed = is_full | ((event > 0) & (event < _CHECKS_NONCE))
    outside = event < 0  # none
    for i in range(tl.max(n, 0)):
        item = tl.load(items_ptr + row * (max_n + 1) + i, mask=changed & (i < n), other=0)
        outside |= (i < n) & ((item < score_min) | (item > score_max))
    reason = tl.where(outside, _OUTSIDE, _VALID)
    reason = tl.where((count != n) | is_full, _WRONG_COUNT, reason)
    reason = tl.where(event == _CLOSES_BAD, _NO_INTEGER, reason)
    reason = tl.where(event == _FORGETS, _UNDECIDED, reason)
    tl.store(reason_ptr + row, reason.to(tl.int64), mask=changed)
    # Scores from the n-th on are 0 from the start.
    for i in range(tl.max(n, 0)):
        item = tl.load(items_ptr + row * (max_n + 1) + i, mask=changed & (i < n), other=0)
        score = tl.where(reason == _VALID, item, 0)
        tl.store(scores_ptr + row * max_n + i, score, mask=changed & (i < n))
    is_invalid = (event == _CLOSES) & (reason != _VALID)
    return is_full | is_invalid | ((event == _CHECKS_NONCE) & (value != nonce))


@triton.jit
def advance_rows(
    control,  # (ROWS,) int64
    token,  # (ROWS,) int64, num_tokens - 1 for none
    row,  # (ROWS,) int64
    mask,  # (ROWS,) bool
    value_ptr,  # (B,) int64, as the next six: the registers of a `ScoreState`
    count_ptr,
    items_ptr,  # (B, max_n + 1)
    n_ptr,
    nonce_ptr,
    reason_ptr,
    scores_ptr,  # (B, max_n)
    max_n,
    table_ptr,  # (C, num_columns) int16
    transitions_ptr,  # (C * symbols, 7) int64
    symbols_ptr,
    column_ptr,  # (num_tokens,) int64, as the next two
    first_ptr,
    last_ptr,
    num_columns,
    num_tokens,
    score_min,
    score_max,
    saturated,
):
    """The control states of a block of rows after one more token each. Registers stay in memory and
    are read only if a token has an action."""
    column = tl.load(column_ptr + token, mask=mask, other=0)
    table_ptrs = table_ptr + control * num_columns + column
    following = tl.load(table_ptrs, mask=mask, other=0).to(tl.int64)  # (ROWS,)
    walks = following == _WALKS
    if tl.max(walks.to(tl.int32), 0) > 0:
        value = tl.load(value_ptr + row, mask=walks, other=0)
        count = tl.load(count_ptr + row, mask=walks, other=0)
        symbol_index = tl.load(first_ptr + token, mask=walks, other=0).to(tl.int32)
        last = tl.load(last_ptr + token, mask=walks, other=0).to(tl.int32)
        state = control.to(tl.int32)
        for _ in range(tl.max(last - symbol_index, 0)):
            symbol = tl.load(symbols_ptr + symbol_index, mask=walks, other=0).to(tl.int32)
            edge_ptrs = transitions_ptr + (state * _SYMBOLS + symbol) * _NUMBERS
            state = tl.load(edge_ptrs, mask=walks, other=0).to(tl.int32)
            # The item under way is stored with every symbol, so it is complete when it ends.
            item_ptrs = items_ptr + row * (max_n + 1) + tl.minimum(count, max_n)
            tl.store(item_ptrs, value, mask=walks)
            value *= tl.load(edge_ptrs + 1, mask=walks, other=0)
            value += tl.load(edge_ptrs + 2, mask=walks, other=0)
            value = tl.minimum(tl.maximum(value, -saturated), saturated)
            count *= tl.load(edge_ptrs + 3, mask=walks, other=0)
            count += tl.load(edge_ptrs + 4, mask=walks, other=0)
            event = tl.load(edge_ptrs + 5, mask=walks, other=0).to(tl.int32)
            if tl.max(event, 0) > 0:
                fails = _record_rows(
                    event, value, count, row,
                    items_ptr, n_ptr, nonce_ptr, reason_ptr, scores_ptr, max_n,
                    score_min, score_max,
                )  # fmt: skip
                otherwise = tl.load(edge_ptrs + 6, mask=walks, other=0).to(tl.int32)
                state = tl.where(fails, otherwise, state)
            symbol_index = tl.minimum(symbol_index + 1, last)
        tl.store(value_ptr + row, value, mask=walks)
        tl.store(count_ptr + row, count, mask=walks)
        following = tl.where(walks, state.to(tl.int64), following)
    return following


def rows_launch(target: Target) -> dict[str, int]:
    """Rows of a program of `advance_rows`, and its warps: one row per thread, so that a thread only
    loads what it stored itself."""
    return {"ROWS": 64 if target.is_hip else 32, "num_warps": 1}


@dataclass
class ScoreState:
    """The automaton of B rows; every field has B as its first dimension."""

    control: Tensor  # (B,) int64
    value: Tensor  # (B,) int64, the item being read
    count: Tensor  # (B,) int64, items of the box being read that are complete
    items: Tensor  # (B, max_n + 1) int64, these items; those past max_n go into the last column
    n: Tensor  # (B,) int64, scores expected
    nonce: Tensor  # (B,) int64, that an anchored line must hold, where rules have a nonce
    reason: Tensor  # (B,) int64, of the box that decides so far, else UNDECIDED
    scores: Tensor  # (B, max_n) int64, its scores if VALID, else 0

    @property
    def decided(self) -> Tensor:
        """(B,) bool: no later token can change the row (only where the first box decides)."""
        return self.control == _DECIDED

    def registers(self) -> tuple[Any, ...]:
        """What `advance_rows` takes of a state. ValueError for a field that is not contiguous."""
        for f in fields(self):
            field = getattr(self, f.name)
            if not field.is_contiguous():
                raise ValueError(f"{f.name} must be contiguous, got strides {field.stride()}")
        max_n = self.scores.shape[1]
        return (
            self.value, self.count, self.items, self.n, self.nonce, self.reason, self.scores, max_n,
        )  # fmt: skip

    def index_select(self, index: Tensor) -> "ScoreState":
        """The rows `index` (int64), copied."""
        return ScoreState(*(getattr(self, f.name).index_select(0, index) for f in fields(self)))

    def first(self, count: int) -> "ScoreState":
        """The first `count` rows, as views."""
        return ScoreState(*(getattr(self, f.name)[:count] for f in fields(self)))

    def copy_(self, other: "ScoreState") -> None:
        """Take the values of as many other rows."""
        for f in fields(self):
            getattr(self, f.name).copy_(getattr(other, f.name))

    @staticmethod
    def concat(states: Sequence["ScoreState"]) -> "ScoreState":
        """The rows of several states with the same max_n, one after the other."""
        return ScoreState(
            *(torch.cat([getattr(state, f.name) for state in states]) for f in fields(ScoreState))
        )


def scores_of(state: ScoreState, finished: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B, max_n) int64, 0 where not valid, and reason (B,) int64 (see `Reason`).

    finished (B,) bool: the sample ended by itself (False: it was cut by the token limit).
    """
    absent = torch.where(finished, int(Reason.MISSING), int(Reason.TRUNCATED))
    return state.scores, torch.where(state.reason == Reason.UNDECIDED, absent, state.reason)


class ScoreAutomaton:
    """The automaton of one tokenizer and one way to write scores, as tables on one device.

    token_bytes: the bytes of each token id, of every id the model can produce; those of
    special_ids are ignored. ValueError for a special id outside the vocabulary.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        special_ids: Collection[int],
        rules: ScoreRules,
        device: torch.device | str = "cpu",
    ) -> None:
        if not all(0 <= token < len(token_bytes) for token in special_ids):
            raise ValueError(
                f"special ids must be below {len(token_bytes)}, got {sorted(special_ids)}"
            )
        self.rules = rules
        self.token_bytes, self.special_ids = token_bytes, special_ids
        # Values saturate here, so integers may have any length; a nonce saturates at its own bound.
        largest = max(abs(rules.score_min), abs(rules.score_max)) + 1
        self._saturated = BOUND if rules.nonce else largest
        self.vocab_size = len(token_bytes)
        table, self._start, place = transitions(rules)

        # Every token's symbols end in a PAD; one more token, of no bytes, fills short rows.
        texts: list[tuple[int, ...]] = [
            (RESET,) if token in special_ids else tuple(text)
            for token, text in enumerate([*token_bytes, b""])
        ]
        columns, column = _compose(table, texts)
        last = torch.tensor([len(text) + 1 for text in texts]).cumsum(0) - 1
        symbols = torch.tensor([symbol for text in texts for symbol in (*text, PAD)])
        self._transitions = table.flatten(0, 1).to(device)  # (C * symbols, 7)
        self._symbols = symbols.to(device)
        self._last = last.to(device)  # (V + 1,)
        self._first = (last - torch.tensor([len(text) for text in texts])).to(device)  # (V + 1,)
        self._column = column.to(device)  # (V + 1,)
        self._table = columns.to(device)  # (C, K) int16
        self.place = place.to(device)  # (C,), where in a number each state is

    def start(
        self,
        n: Tensor,
        max_n: int,
        nonces: Sequence[int] | None = None,
        openings: Sequence[bytes] = (),
    ) -> ScoreState:
        """The state of rows that expect n (B,) int64 scores, 0 <= n <= max_n. nonces: of each row,
        where rules have one (0 where not given). openings: of each row, the text of its prompt that
        it goes on with. With n on CPU and no opening nothing waits for the device."""
        if n.dim() != 1 or n.dtype != torch.int64 or ((n < 0) | (n > max_n)).any():
            raise ValueError(f"n must be (B,) int64 in [0, {max_n}], got {n}")
        if nonces is not None and not self.rules.nonce:
            raise ValueError("nonces are for rules that have one")
        device = self._table.device
        zero = torch.zeros(len(n), dtype=torch.int64, device=device)
        state = ScoreState(
            control=zero + self._start,
            value=zero.clone(),
            count=zero.clone(),
            items=zero[:, None].repeat(1, max_n + 1),
            n=to_device(n, device).clone(),
            nonce=zero.clone() if nonces is None else to_device(torch.tensor(nonces), device),
            reason=zero + int(Reason.UNDECIDED),
            scores=zero[:, None].repeat(1, max_n),
        )
        for opening in set(openings) - {b""}:
            rows = torch.tensor([i for i, text in enumerate(openings) if text == opening])
            rows = to_device(rows, device)
            for byte in opening:
                state.control[rows] = self._step(state, rows, torch.full_like(rows, byte))
        return state

    def advance_ref(self, state: ScoreState, tokens: Tensor) -> None:
        """Move every row past its next token, in place and in torch; reads `any` flags.

        tokens: (B,) int64, ids below V, or V for no token.
        """
        following = self._table[state.control, self._column[tokens]].long()
        by_symbol = following == _BY_SYMBOL
        if by_symbol.any():
            rows = by_symbol.nonzero()[:, 0]
            following[rows] = self._advance_by_symbol(state, rows, tokens[rows])
        state.control.copy_(following)

    def tables(self) -> tuple[Any, ...]:
        """What `advance_rows` takes of an automaton."""
        return (
            self._table, self._transitions, self._symbols, self._column, self._first, self._last,
            self._table.shape[1], self.vocab_size + 1,
            self.rules.score_min, self.rules.score_max, self._saturated,
        )  # fmt: skip

    def _advance_by_symbol(self, state: ScoreState, rows: Tensor, tokens: Tensor) -> Tensor:
        """Walk the tokens of some rows, with their actions; returns the control states."""
        symbol_index, last = self._first[tokens], self._last[tokens]
        control = state.control[rows]
        for _ in range(int((last - symbol_index).max())):
            state.control[rows] = control
            control = self._step(state, rows, self._symbols[symbol_index])
            symbol_index = torch.minimum(symbol_index + 1, last)
        return control

    def _step(self, state: ScoreState, rows: Tensor, symbol: Tensor) -> Tensor:
        """The control states of some rows after one more symbol each, whose actions are done."""
        value, count, items = state.value[rows], state.count[rows], state.items[rows]
        edges = self._transitions[state.control[rows] * ALPHABET + symbol]
        control, value_scale, digit, count_scale, ended, event, otherwise = edges.unbind(1)
        # The item under way is stored with every symbol, so it is complete when it ends.
        items = items.scatter(1, count.clamp(max=items.shape[1] - 1)[:, None], value[:, None])
        value = (value * value_scale + digit).clamp_(-self._saturated, self._saturated)
        count = count * count_scale + ended
        state.value[rows], state.count[rows], state.items[rows] = value, count, items
        if not event.any():
            return control
        fails = self._record(state, rows, event)
        return torch.where(fails, otherwise, control)

    def _record(self, state: ScoreState, rows: Tensor, event: Tensor) -> Tensor:
        """Write the outcome of boxes that close, and clear that of rows that forget. Returns whose
        check has failed."""
        value, count, n = state.value[rows], state.count[rows], state.n[rows]
        items = state.items[rows][:, :-1]
        expected = torch.arange(items.shape[1], device=items.device) < n[:, None]
        outside = (items < self.rules.score_min) | (items > self.rules.score_max)
        is_full = (event == CHECK_ROOM) & (count >= n)
        reason = torch.where((expected & outside).any(1), int(Reason.RANGE), int(Reason.VALID))
        reason = torch.where((count != n) | is_full, int(Reason.COUNT), reason)
        reason = torch.where(event == CLOSE_BAD, int(Reason.NOT_AN_INTEGER), reason)
        reason = torch.where(event == FORGET, int(Reason.UNDECIDED), reason)
        scores = items * (expected & (reason == Reason.VALID)[:, None])
        changed = is_full | (event == CLOSE) | (event == CLOSE_BAD) | (event == FORGET)
        state.reason[rows] = torch.where(changed, reason, state.reason[rows])
        state.scores[rows] = torch.where(changed[:, None], scores, state.scores[rows])
        is_invalid = (event == CLOSE) & (reason != Reason.VALID)
        return is_full | is_invalid | ((event == CHECK_NONCE) & (value != state.nonce[rows]))


def _compose(table: Tensor, texts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """The state after each token, _BY_SYMBOL where its path has an action: distinct columns (C, K)
    int16, and the column of each token, (tokens,) int64."""
    num_states = table.shape[0]
    has_action = (table[..., 1:6] != torch.tensor([1, 0, 1, 0, 0])).any(-1)
    # The row num_states absorbs: once a path has met an action, it stays marked.
    following = table[..., 0].masked_fill(has_action, num_states)
    following = torch.cat([following, torch.full((1, ALPHABET), num_states)])
    edges = following.T.short().numpy()  # (symbols, C + 1)
    columns = [np.arange(num_states, dtype=np.int16)]
    known = {columns[0].tobytes(): 0}
    after: dict[tuple[int, int], int] = {}  # the column of a text with a column, then a symbol
    column = []
    for text in texts:
        at = 0
        for symbol in text:
            found = after.get((at, symbol))
            if found is None:
                states = edges[symbol][columns[at]]
                found = known.setdefault(states.tobytes(), len(columns))
                if found == len(columns):
                    columns.append(states)
                after[at, symbol] = found
            at = found
        column.append(at)
    distinct = torch.from_numpy(np.stack(columns, 1))
    return distinct.masked_fill(distinct == num_states, _BY_SYMBOL), torch.tensor(column)
