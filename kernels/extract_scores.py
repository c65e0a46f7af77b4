r"""Read the scores out of generated tokens: an automaton over their bytes, one token at a time.

Dimension letters: B rows (live samples), V vocabulary, C control states.

Language (`parse_scores` is the specification). With an anchor: after the first line that begins
with the anchor, the first complete `\boxed{` ... `}` decides, valid or not. Without an anchor: the
last complete box of the text. A box ends at the first `}`. Its content must be exactly n integers
(one optional sign and ASCII digits), separated by commas, with blanks (space, tab, CR, LF) around
them, each within [score_min, score_max]. A special token has no bytes and resets an undecided row:
the text starts anew after it. A decided row (anchor only) stays decided.

Design. The control state is an integer: the position in the anchor, in `\boxed{`, or in the
content. A table over (state, symbol) has the next state and the symbol's action on the registers:
item value, item count, event. Symbols are the 256 bytes, RESET (a special token) and PAD. A second
table, over (state, token), has the next state of whole tokens without an action, which are nearly
all: a decode step is one look-up, and only rows inside a box walk their token symbol by symbol.

`advance_rows` is that step for a block of rows in a Triton kernel; `ScoreAutomaton.advance_ref` is
the same step in torch. Neither un-permutes scores or votes, and neither sees the prompt.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import to_device
from kernels.target import Target

_BOX = rb"\boxed{"
_INTEGER = re.compile(rb"[+-]?[0-9]+")
_BLANKS = b" \t\r\n"
_RESET, _PAD, _ALPHABET = 256, 257, 258
# Control states: decided, then the content of a box, then 7 places in `\boxed{`, then the anchor.
_DECIDED, _FIRST, _ITEM, _PLUS, _MINUS, _DIGITS, _NEG_DIGITS, _AFTER, _BAD, _SEARCH = range(10)
_ANCHOR = _SEARCH + len(_BOX)
_CLOSE, _CLOSE_BAD, _FORGET = 1, 2, 3  # events
_BY_SYMBOL = -1  # in the token table: the token has an action
_MAX_ANCHOR = 256  # bytes; the token table has a row for each
_BOUND = 10**17  # of scores, so that ten times a value fits in int64


class Reason(IntEnum):
    """Why a sample has no vote (or VALID); UNDECIDED is internal to a running state."""

    UNDECIDED = -1
    VALID = 0
    MISSING = 1
    COUNT = 2
    RANGE = 3
    NOT_AN_INTEGER = 4
    TRUNCATED = 5

    @property
    def label(self) -> str:
        """The reason as it stands in a verdict line."""
        return self.name.lower().replace("_", " ")


def parse_scores(
    data: bytes, n: int, anchor: bytes | None, score_min: int, score_max: int, finished: bool
) -> tuple[Reason, tuple[int, ...]]:
    """The specification on plain bytes: the reason, and the n scores if it is VALID.

    data: the bytes of the text (after the last special token); anchor None: no anchor; finished:
    the text ended by itself, so that an absent box is MISSING and not TRUNCATED.
    """
    contents = []
    start = 0 if anchor is None else _after_anchor(data, anchor)
    while start >= 0 and (box := data.find(_BOX, start)) >= 0:
        end = data.find(b"}", box)
        if end < 0:
            break
        contents.append(data[box + len(_BOX) : end])
        start = end + 1
    if not contents:
        return Reason.MISSING if finished else Reason.TRUNCATED, ()
    content = contents[-1 if anchor is None else 0]
    items = [item.strip(_BLANKS) for item in content.split(b",")] if content.strip(_BLANKS) else []
    if not all(_INTEGER.fullmatch(item) for item in items):
        return Reason.NOT_AN_INTEGER, ()
    if len(items) != n:
        return Reason.COUNT, ()
    scores = tuple(_integer(item) for item in items)
    if not all(score_min <= score <= score_max for score in scores):
        return Reason.RANGE, ()
    return Reason.VALID, scores


def _after_anchor(data: bytes, anchor: bytes) -> int:
    """Index just after the anchor of the first line that begins with it, or -1."""
    start = 0
    while not data.startswith(anchor, start):
        start = data.find(b"\n", start) + 1
        if start == 0:
            return -1
    return start + len(anchor)


def _integer(item: bytes) -> int:
    """The integer; one of the same sign out of every range for many digits: int() refuses 5000."""
    digits = item.lstrip(b"+-").lstrip(b"0") or b"0"
    magnitude = int(digits) if len(digits) < 18 else _BOUND
    return -magnitude if item.startswith(b"-") else magnitude


def extract_scores_ref(
    token_bytes: Sequence[bytes],
    special_ids: Collection[int],
    tokens: Sequence[int],
    n: int,
    anchor: bytes | None,
    score_min: int,
    score_max: int,
    finished: bool,
) -> tuple[Reason, tuple[int, ...]]:
    """The specification on the tokens of one row: `parse_scores` between special tokens."""
    text = bytearray()
    for token in tokens:
        if token not in special_ids:
            text += token_bytes[token]
            continue
        reason, _ = parse_scores(bytes(text), n, anchor, score_min, score_max, True)
        if anchor is not None and reason != Reason.MISSING:
            break
        text.clear()
    return parse_scores(bytes(text), n, anchor, score_min, score_max, finished)


# Triton takes no other globals.
DECIDED = tl.constexpr(_DECIDED)
_SYMBOLS, _WALKS = tl.constexpr(_ALPHABET), tl.constexpr(_BY_SYMBOL)
_CLOSES_BAD, _FORGETS = tl.constexpr(_CLOSE_BAD), tl.constexpr(_FORGET)
_UNDECIDED, _VALID = tl.constexpr(int(Reason.UNDECIDED)), tl.constexpr(int(Reason.VALID))
_WRONG_COUNT, _OUTSIDE = tl.constexpr(int(Reason.COUNT)), tl.constexpr(int(Reason.RANGE))
_NO_INTEGER = tl.constexpr(int(Reason.NOT_AN_INTEGER))


@triton.jit
def _record_rows(
    event, count, row, items_ptr, n_ptr, reason_ptr, scores_ptr, max_n, score_min, score_max
):
    """Write the outcome of boxes that close, and clear that of rows that forget."""
    changed = event > 0  # (ROWS,)
    n = tl.load(n_ptr + row, mask=changed, other=0)
    outside = event < 0  # none
    for i in range(tl.max(n, 0)):
        item = tl.load(items_ptr + row * (max_n + 1) + i, mask=i < n, other=0)
        outside |= (i < n) & ((item < score_min) | (item > score_max))
    reason = tl.where(outside, _OUTSIDE, _VALID)
    reason = tl.where(count != n, _WRONG_COUNT, reason)
    reason = tl.where(event == _CLOSES_BAD, _NO_INTEGER, reason)
    reason = tl.where(event == _FORGETS, _UNDECIDED, reason)
    tl.store(reason_ptr + row, reason.to(tl.int64), mask=changed)
    # Scores from the n-th on are 0 from the start.
    for i in range(tl.max(n, 0)):
        item = tl.load(items_ptr + row * (max_n + 1) + i, mask=i < n, other=0)
        score = tl.where(reason == _VALID, item, 0)
        tl.store(scores_ptr + row * max_n + i, score, mask=i < n)


@triton.jit
def advance_rows(
    control,  # (ROWS,) int64
    token,  # (ROWS,) int64, num_tokens - 1 for none
    row,  # (ROWS,) int64
    mask,  # (ROWS,) bool
    value_ptr,  # (B,) int64, as the next five: the registers of a `ScoreState`
    count_ptr,
    items_ptr,  # (B, max_n + 1)
    n_ptr,
    reason_ptr,
    scores_ptr,  # (B, max_n)
    max_n,
    table_ptr,  # (C, num_tokens) int16
    transitions_ptr,  # (C * symbols, 6) int64
    symbols_ptr,
    first_ptr,  # (num_tokens,) int64
    last_ptr,  # (num_tokens,) int64
    num_tokens,
    score_min,
    score_max,
    saturated,
):
    """The control states of a block of rows after one more token each. Registers stay in memory and
    are read only if a token has an action."""
    table_ptrs = table_ptr + control * num_tokens + token
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
            edge_ptrs = transitions_ptr + (state * _SYMBOLS + symbol) * 6
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
                _record_rows(
                    event, count, row,
                    items_ptr, n_ptr, reason_ptr, scores_ptr, max_n, score_min, score_max,
                )  # fmt: skip
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
    reason: Tensor  # (B,) int64, of the box that decides so far, else UNDECIDED
    scores: Tensor  # (B, max_n) int64, its scores if VALID, else 0

    @property
    def decided(self) -> Tensor:
        """(B,) bool: no later token can change the row (never without an anchor)."""
        return self.control == _DECIDED

    def registers(self) -> tuple[Any, ...]:
        """What `advance_rows` takes of a state. ValueError for a field that is not contiguous."""
        for f in fields(self):
            field = getattr(self, f.name)
            if not field.is_contiguous():
                raise ValueError(f"{f.name} must be contiguous, got strides {field.stride()}")
        max_n = self.scores.shape[1]
        return self.value, self.count, self.items, self.n, self.reason, self.scores, max_n

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
    """The automaton of one tokenizer, anchor and score range, as tables on one device.

    token_bytes: the bytes of each token id, of every id the model can produce; those of
    special_ids are ignored. anchor None: the last box decides (see the module's docstring).
    ValueError for an anchor with a newline, an empty or too large range, or a special id outside
    the vocabulary.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        special_ids: Collection[int],
        anchor: str | None,
        score_min: int,
        score_max: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if anchor is not None and "\n" in anchor:
            raise ValueError(f"anchor must not contain a newline, got {anchor!r}")
        if not -_BOUND < score_min <= score_max < _BOUND:
            raise ValueError(
                f"score_min and score_max must be ordered and within +-{_BOUND}, "
                f"got {score_min} and {score_max}"
            )
        if not all(0 <= token < len(token_bytes) for token in special_ids):
            raise ValueError(
                f"special ids must be below {len(token_bytes)}, got {sorted(special_ids)}"
            )
        anchor_bytes = None if anchor is None else anchor.encode()
        if len(anchor_bytes or b"") > _MAX_ANCHOR:
            raise ValueError(f"anchor must have at most {_MAX_ANCHOR} bytes, got {anchor!r}")
        self.score_min, self.score_max = score_min, score_max
        # Values saturate here, so integers may have any length.
        self._saturated = max(abs(score_min), abs(score_max)) + 1
        self.vocab_size = len(token_bytes)
        transitions, self._start = _transitions(anchor_bytes)

        # Every token's symbols end in a PAD; one more token, of no bytes, fills short rows.
        texts = [
            [_RESET, _PAD] if token in special_ids else [*text, _PAD]
            for token, text in enumerate([*token_bytes, b""])
        ]
        lengths = torch.tensor([len(text) for text in texts])
        symbols = torch.tensor([symbol for text in texts for symbol in text])
        last = lengths.cumsum(0) - 1
        first = last - lengths + 1
        table = _compose(transitions, symbols, first, last)
        self._transitions = transitions.flatten(0, 1).to(device)  # (C * symbols, 6)
        self._symbols = symbols.to(device)
        self._first, self._last = first.to(device), last.to(device)  # (V + 1,)
        self._table = table.to(device)  # (C, V + 1) int16

    def start(self, n: Tensor, max_n: int) -> ScoreState:
        """The state of rows without text that expect n (B,) int64 scores, 0 <= n <= max_n. With n
        on CPU nothing waits for the device."""
        if n.dim() != 1 or n.dtype != torch.int64 or ((n < 0) | (n > max_n)).any():
            raise ValueError(f"n must be (B,) int64 in [0, {max_n}], got {n}")
        device = self._table.device
        zero = torch.zeros(len(n), dtype=torch.int64, device=device)
        return ScoreState(
            control=zero + self._start,
            value=zero,
            count=zero.clone(),
            items=zero[:, None].repeat(1, max_n + 1),
            n=to_device(n, device).clone(),
            reason=zero + int(Reason.UNDECIDED),
            scores=zero[:, None].repeat(1, max_n),
        )

    def advance_ref(self, state: ScoreState, tokens: Tensor) -> None:
        """Move every row past its next token, in place and in torch; reads `any` flags.

        tokens: (B,) int64, ids below V, or V for no token.
        """
        following = self._table[state.control, tokens].long()
        by_symbol = following == _BY_SYMBOL
        if by_symbol.any():
            rows = by_symbol.nonzero()[:, 0]
            following[rows] = self._advance_by_symbol(state, rows, tokens[rows])
        state.control.copy_(following)

    def tables(self) -> tuple[Any, ...]:
        """What `advance_rows` takes of an automaton."""
        return (
            self._table, self._transitions, self._symbols, self._first, self._last,
            self.vocab_size + 1, self.score_min, self.score_max, self._saturated,
        )  # fmt: skip

    def _advance_by_symbol(self, state: ScoreState, rows: Tensor, tokens: Tensor) -> Tensor:
        """Walk the tokens of some rows, with their actions; returns the control states."""
        control, value, count = state.control[rows], state.value[rows], state.count[rows]
        items = state.items[rows]
        symbol_index, last = self._first[tokens], self._last[tokens]
        for _ in range(int((last - symbol_index).max())):
            symbol = self._symbols[symbol_index]
            control, value_scale, digit, count_scale, ended, event = self._transitions[
                control * _ALPHABET + symbol
            ].unbind(1)
            # The item under way is stored with every symbol, so it is complete when it ends.
            items.scatter_(1, count.clamp(max=items.shape[1] - 1)[:, None], value[:, None])
            value = (value * value_scale + digit).clamp_(-self._saturated, self._saturated)
            count = count * count_scale + ended
            if event.any():
                self._record(state, rows, event, count, items[:, :-1])
            symbol_index = torch.minimum(symbol_index + 1, last)
        state.value[rows], state.count[rows], state.items[rows] = value, count, items
        return control

    def _record(
        self, state: ScoreState, rows: Tensor, event: Tensor, count: Tensor, items: Tensor
    ) -> None:
        """Write the outcome of boxes that close, and clear that of rows that forget."""
        n = state.n[rows]
        expected = torch.arange(items.shape[1], device=items.device) < n[:, None]
        outside = expected & ((items < self.score_min) | (items > self.score_max))
        reason = torch.where(outside.any(1), int(Reason.RANGE), int(Reason.VALID))
        reason = torch.where(count != n, int(Reason.COUNT), reason)
        reason = torch.where(event == _CLOSE_BAD, int(Reason.NOT_AN_INTEGER), reason)
        reason = torch.where(event == _FORGET, int(Reason.UNDECIDED), reason)
        scores = items * (expected & (reason == Reason.VALID)[:, None])
        changed = event.nonzero()[:, 0]
        state.reason[rows[changed]] = reason[changed]
        state.scores[rows[changed]] = scores[changed]


def _transitions(anchor: bytes | None) -> tuple[Tensor, int]:
    """The table (C, symbols, 6) int64 over control states and symbols, and the first state.

    Last dimension: next state; scale and digit (value := value * scale + digit); scale and ended
    (count := count * scale + ended); event.
    """
    keep, opening, ended = (1, 0, 1, 0, 0), (0, 0, 0, 0, 0), (0, 0, 1, 1, 0)
    size = len(anchor or b"")
    skip_line = _ANCHOR + size
    start = _ANCHOR if anchor else _SEARCH
    after_box, forget = (_SEARCH, _FORGET) if anchor is None else (_DECIDED, 0)
    table = [[(state, *keep)] * _ALPHABET for state in range(skip_line + 1)]
    for state in range(_FIRST, skip_line + 1):
        table[state][_RESET] = (start, 1, 0, 1, 0, forget)

    for place in range(size + 1):
        table[_ANCHOR + place][:_RESET] = [(skip_line, *keep)] * _RESET
        table[_ANCHOR + place][ord("\n")] = (_ANCHOR, *keep)
    for place, byte in enumerate(anchor or b""):
        following = _SEARCH if place + 1 == size else _ANCHOR + place + 1
        table[_ANCHOR + place][byte] = (following, *keep)

    for place in range(len(_BOX)):
        for byte in range(_RESET):
            seen = _BOX[:place] + bytes([byte])
            matched = max(k for k in range(len(_BOX)) if seen.endswith(_BOX[:k]))
            table[_SEARCH + place][byte] = (_SEARCH + matched, *keep)
    table[_SEARCH + len(_BOX) - 1][_BOX[-1]] = (_FIRST, *opening)

    for state in range(_FIRST, _SEARCH):
        table[state][:_RESET] = [(_BAD, *keep)] * _RESET
        table[state][ord("}")] = (after_box, 1, 0, 1, 0, _CLOSE_BAD)
    table[_FIRST][ord("}")] = (after_box, 1, 0, 1, 0, _CLOSE)
    for state in (_FIRST, _ITEM):
        table[state][ord("+")] = (_PLUS, *keep)
        table[state][ord("-")] = (_MINUS, *keep)
        for blank in _BLANKS:
            table[state][blank] = (state, *keep)
    for state in (_DIGITS, _NEG_DIGITS, _AFTER):
        table[state][ord(",")] = (_ITEM, *ended)
        table[state][ord("}")] = (after_box, 1, 0, 1, 1, _CLOSE)
        for blank in _BLANKS:
            table[state][blank] = (_AFTER, *keep)
    for digit in range(10):
        for state in (_FIRST, _ITEM, _PLUS, _DIGITS):
            table[state][ord("0") + digit] = (_DIGITS, 10, digit, 1, 0, 0)
        for state in (_MINUS, _NEG_DIGITS):
            table[state][ord("0") + digit] = (_NEG_DIGITS, 10, -digit, 1, 0, 0)
    return torch.tensor(table), start


def _compose(transitions: Tensor, symbols: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """(C, tokens) int16: the state after each token, _BY_SYMBOL where its path has an action."""
    num_states = transitions.shape[0]
    has_action = (transitions[..., 1:] != torch.tensor([1, 0, 1, 0, 0])).any(-1)
    following = transitions[..., 0].masked_fill(has_action, num_states)
    # The row num_states absorbs: once a path has met an action, it stays marked.
    following = torch.cat([following, torch.full((1, _ALPHABET), num_states)])
    by_length = (last - first).argsort(descending=True)
    first, length = first[by_length], (last - first)[by_length]
    state = torch.arange(num_states)[:, None].repeat(1, len(by_length))
    for place in range(int(length[0])):
        longer = int((length > place).sum())
        state[:, :longer] = following[state[:, :longer], symbols[first[:longer] + place]]
    state[state == num_states] = _BY_SYMBOL
    return torch.empty_like(state, dtype=torch.int16).index_copy_(1, by_length, state.short())
