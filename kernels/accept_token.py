"""Append to every live sample the token that was drawn for it, in one launch.

Dimension letters: B live samples, S slots, M tokens of a slot's records, E end tokens, J blocks.

For every unfinished sample with slot s and c tokens so far:
  1. tokens[s, c], logprobs[0, s, c], logprobs[1, s, c] = token, logprob, sampling_logprob, and
     expected[s, c] = its expected score, where there are any (`kernels/expected_score.py`)
  2. the score automaton reads the token, unless it is an end token: that has no bytes and must not
     reset the automaton as other special tokens do
  3. the token is the sample's last and its count c + 1; an end token (`ended`), the limit or, with
     stop_at_box, decided scores finish it
  4. in decode its cursor advances by one: the next token's position, suffix length and cache index,
     which jumps to the next block at the end of one
A finished sample does not change. Everything is in place, and the host reads nothing.

Drawing tokens, the cache, and the removal of finished samples are elsewhere.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import cpp
from kernels.checks import check, check_triton
from kernels.cpp import runs_cpp
from kernels.extract_scores import (
    DECIDED,
    ScoreAutomaton,
    ScoreState,
    advance_rows,
    rows_launch,
)
from kernels.forest_attention.plan import MAX_SPLIT
from kernels.launch import launch, runs_triton
from kernels.target import target_of


class Cursor(NamedTuple):
    """Of each row's next token the position, the suffix length (itself included) and the cache
    index, (at least B,) int64 each, and the suffixes' blocks (at least B, J) int64, as `Suffixes`
    has them. A sample must have a block for every key that it may come to."""

    position: Tensor
    length: Tensor
    cache_index: Tensor
    blocks: Tensor

    def cells(self, keys: Tensor) -> Tensor:
        """(B,) int64: the cache index of key `keys[b]` of each of the first B rows."""
        block = self.blocks[: len(keys)].gather(1, (keys // MAX_SPLIT)[:, None])[:, 0]
        return block + keys % MAX_SPLIT


@dataclass
class LiveSamples:
    """The state of B live samples on the device; `accept_token` updates it in place."""

    token: Tensor  # (B,) int64, the last token, whose keys are not yet in the cache
    count: Tensor  # (B,) int64, tokens generated
    limit: Tensor  # (B,) int64, most tokens to generate, 1 to M
    slot: Tensor  # (B,) int64, distinct
    finished: Tensor  # (B,) bool
    ended: Tensor  # (B,) bool, by an end token
    scores: ScoreState

    @staticmethod
    def start(limit: Tensor, slot: Tensor, scores: ScoreState) -> "LiveSamples":
        """Samples without a token; limit and slot are kept, not copied."""
        zero = torch.zeros_like(limit)
        return LiveSamples(zero, zero.clone(), limit, slot, zero.bool(), zero.bool(), scores)

    def index_select(self, index: Tensor) -> "LiveSamples":
        """The samples `index` (int64), copied."""
        rows = {name: value[index] for name, value in self.tensors().items()}
        return LiveSamples(**rows, scores=self.scores.index_select(index))

    def first(self, count: int) -> "LiveSamples":
        """The first `count` samples, as views."""
        rows = {name: value[:count] for name, value in self.tensors().items()}
        return LiveSamples(**rows, scores=self.scores.first(count))

    def copy_(self, other: "LiveSamples") -> None:
        """Take the values of as many others."""
        for name, value in other.tensors().items():
            getattr(self, name).copy_(value)
        self.scores.copy_(other.scores)

    def concat(self, other: "LiveSamples") -> "LiveSamples":
        """These samples, then the other's."""
        theirs = other.tensors()
        rows = {name: torch.cat([value, theirs[name]]) for name, value in self.tensors().items()}
        return LiveSamples(**rows, scores=ScoreState.concat([self.scores, other.scores]))

    def tensors(self) -> dict[str, Tensor]:
        """The fields but `scores`, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scores"}


@dataclass
class Records:
    """The tokens that samples have generated, and their log-probs, by slot."""

    tokens: Tensor  # (S, M) int64
    logprobs: Tensor  # (2, S, M) float32: under the model, and under the distribution sampled from
    expected: Tensor | None = None  # (S, M) float32, expected scores

    @staticmethod
    def empty(
        num_slots: int,
        max_tokens: int,
        device: torch.device | str = "cpu",
        expects: bool = False,
    ) -> "Records":
        """Room for `max_tokens` tokens in each slot; expects: and for their expected scores."""
        return Records(
            torch.zeros(num_slots, max_tokens, dtype=torch.int64, device=device),
            torch.zeros(2, num_slots, max_tokens, device=device),
            torch.zeros(num_slots, max_tokens, device=device) if expects else None,
        )

    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        return [x for x in (self.tokens, self.logprobs, self.expected) if x is not None]


def accept_token_ref(
    live: LiveSamples,
    records: Records,
    token: Tensor,
    logprob: Tensor,
    sampling_logprob: Tensor,
    automaton: ScoreAutomaton,
    end_ids: Tensor,
    stop_at_box: bool,
    cursor: Cursor | None = None,
    expected: Tensor | None = None,
) -> None:
    """The specification of `accept_token`, one sample at a time."""
    ends = set(end_ids.tolist())
    for b in range(len(token)):
        if live.finished[b]:
            continue
        slot, count, drawn = int(live.slot[b]), int(live.count[b]), int(token[b])
        records.tokens[slot, count] = drawn
        records.logprobs[0, slot, count] = logprob[b]
        records.logprobs[1, slot, count] = sampling_logprob[b]
        if expected is not None and records.expected is not None:
            records.expected[slot, count] = expected[b]
        scores = ScoreState(*(getattr(live.scores, f.name)[b : b + 1] for f in fields(ScoreState)))
        if drawn not in ends:
            automaton.advance_ref(scores, token[b : b + 1])
        live.token[b], live.count[b], live.ended[b] = drawn, count + 1, drawn in ends
        live.finished[b] = (
            drawn in ends
            or count + 1 >= int(live.limit[b])
            or (stop_at_box and bool(scores.decided))
        )
        if cursor is not None:
            block, offset = divmod(int(cursor.length[b]), MAX_SPLIT)
            cursor.cache_index[b] = cursor.blocks[b, block] + offset
            cursor.position[b] += 1
            cursor.length[b] += 1


@triton.jit
def _accept_token_kernel(
    token_ptr,  # (B,) int64
    logprob_ptr,  # (B,) float32
    sampling_logprob_ptr,  # (B,) float32
    expected_ptr,  # (B,) float32, or None
    last_token_ptr,  # (B,) int64, as the next three
    made_ptr,
    limit_ptr,
    slot_ptr,
    finished_ptr,  # (B,) bool
    ended_ptr,  # (B,) bool
    tokens_ptr,  # (S, M) int64
    logprobs_ptr,  # (2, S, M) float32
    expected_scores_ptr,  # (S, M) float32, or None
    capacity,  # M
    num_recorded,  # S * M
    end_ids_ptr,  # (E,) int64
    num_ends,  # E
    position_ptr,  # (at least B,) int64 or None, as the next two
    length_ptr,
    cache_index_ptr,
    blocks_ptr,  # (at least B, J) int64 or None, stride blocks_b
    blocks_b,
    num_rows,  # B
    control_ptr,  # the state and tables of `advance_rows`
    value_ptr,
    count_ptr,
    items_ptr,
    n_ptr,
    nonce_ptr,
    reason_ptr,
    scores_ptr,
    max_n,
    table_ptr,
    transitions_ptr,
    symbols_ptr,
    column_ptr,
    first_ptr,
    last_ptr,
    num_columns,
    num_tokens,
    score_min,
    score_max,
    saturated,
    SPLIT: tl.constexpr,
    STOP_AT_BOX: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows  # (ROWS,)
    active = mask & (tl.load(finished_ptr + row, mask=mask, other=1) == 0)
    token = tl.load(token_ptr + row, mask=active, other=0)
    logprob = tl.load(logprob_ptr + row, mask=active, other=0.0)
    sampling_logprob = tl.load(sampling_logprob_ptr + row, mask=active, other=0.0)
    made = tl.load(made_ptr + row, mask=active, other=0)
    limit = tl.load(limit_ptr + row, mask=active, other=0)

    offset = tl.load(slot_ptr + row, mask=active, other=0) * capacity + made
    tl.store(tokens_ptr + offset, token, mask=active)
    tl.store(logprobs_ptr + offset, logprob, mask=active)
    tl.store(logprobs_ptr + num_recorded + offset, sampling_logprob, mask=active)
    if expected_ptr is not None:
        expected = tl.load(expected_ptr + row, mask=active, other=0.0)
        tl.store(expected_scores_ptr + offset, expected, mask=active)

    ended = row < 0
    for i in range(num_ends):
        ended |= token == tl.load(end_ids_ptr + i)
    read = tl.where(active & ~ended, token, num_tokens - 1)
    tl.store(last_token_ptr + row, token, mask=active)
    tl.store(made_ptr + row, made + 1, mask=active)
    tl.store(ended_ptr + row, ended, mask=active)
    if position_ptr is not None:
        position = tl.load(position_ptr + row, mask=active, other=0)
        length = tl.load(length_ptr + row, mask=active, other=0)
        block_ptr = blocks_ptr + row * blocks_b + length // SPLIT
        cache_index = tl.load(block_ptr, mask=active, other=0) + length % SPLIT
        tl.store(position_ptr + row, position + 1, mask=active)
        tl.store(length_ptr + row, length + 1, mask=active)
        tl.store(cache_index_ptr + row, cache_index, mask=active)
    finished = ended | (made + 1 >= limit)

    control = tl.load(control_ptr + row, mask=mask, other=0)
    control = advance_rows(
        control, read, row, mask,
        value_ptr, count_ptr, items_ptr, n_ptr, nonce_ptr, reason_ptr, scores_ptr, max_n,
        table_ptr, transitions_ptr, symbols_ptr, column_ptr, first_ptr, last_ptr,
        num_columns, num_tokens, score_min, score_max, saturated,
    )  # fmt: skip
    tl.store(control_ptr + row, control, mask=active)
    if STOP_AT_BOX:
        finished |= control == DECIDED
    tl.store(finished_ptr + row, finished, mask=active)


def _run_triton(
    live: LiveSamples,
    records: Records,
    drawn: Sequence[Tensor | None],
    automaton: ScoreAutomaton,
    end_ids: Tensor,
    stop_at_box: bool,
    cursor: Cursor | None,
) -> None:
    vectors = (*drawn, *live.tensors().values())
    given = [x for x in (*vectors, end_ids, *(cursor or ())) if x is not None]
    check_triton("accept_token", *given)
    for record in records.tensors():
        if not record.is_contiguous():
            raise ValueError(f"accept_token: records must be contiguous, got {record.stride()}")
    options = rows_launch(target_of(live.token))
    num_rows = len(live.token)
    launch(
        _accept_token_kernel,
        (triton.cdiv(num_rows, options["ROWS"]),),
        *vectors, records.tokens, records.logprobs, records.expected, records.tokens.shape[1],
        records.tokens.numel(), end_ids, len(end_ids), *_pointers(cursor), num_rows,
        live.scores.control, *live.scores.registers(), *automaton.tables(),
        SPLIT=MAX_SPLIT, STOP_AT_BOX=stop_at_box, **options,
    )  # fmt: skip


def _pointers(cursor: Cursor | None) -> tuple[Tensor | int | None, ...]:
    """A cursor's tensors, and the stride of its blocks."""
    if cursor is None:
        return None, None, None, None, 0
    return *cursor, cursor.blocks.stride(0)


def _run_cpp(
    live: LiveSamples,
    records: Records,
    drawn: Sequence[Tensor | None],
    automaton: ScoreAutomaton,
    end_ids: Tensor,
    stop_at_box: bool,
    cursor: Cursor | None,
) -> None:
    columns = () if cursor is None else cursor[:3]
    vectors = (*drawn, *live.tensors().values(), live.scores.control, end_ids, *columns)
    for x in (*vectors, *records.tensors()):
        if x is not None and not x.is_contiguous():
            raise ValueError(f"accept_token: tensors must be contiguous, got {x.stride()}")
    state = cpp.structure("Automaton")(
        *(
            x.data_ptr() if isinstance(x, Tensor) else x
            for x in (*live.scores.registers(), *automaton.tables())
        )
    )
    cpp.call(
        "accept_token", torch.float32, *drawn, *live.tensors().values(), records.tokens,
        records.logprobs, records.expected, records.tokens.shape[1], records.tokens.numel(),
        end_ids, len(end_ids), *_pointers(cursor), MAX_SPLIT, len(live.token),
        live.scores.control, ctypes.byref(state), int(stop_at_box),
    )  # fmt: skip


def _run_torch(
    live: LiveSamples,
    records: Records,
    drawn: Sequence[Tensor | None],
    automaton: ScoreAutomaton,
    end_ids: Tensor,
    stop_at_box: bool,
    cursor: Cursor | None,
) -> None:
    token = drawn[0]
    assert token is not None
    active = ~live.finished
    index = live.count.clamp_max(records.tokens.shape[1] - 1)  # a finished sample may be full
    kept = records.tokens, *records.logprobs, records.expected
    for record, value in zip(kept, drawn, strict=True):
        if record is not None and value is not None:
            record[live.slot, index] = torch.where(active, value, record[live.slot, index])
    ended = active & torch.isin(token, end_ids)
    automaton.advance_ref(live.scores, torch.where(active & ~ended, token, automaton.vocab_size))
    live.token.copy_(torch.where(active, token, live.token))
    live.count += active
    live.ended |= ended
    live.finished |= ended | (live.count >= live.limit)
    if stop_at_box:
        live.finished |= live.scores.decided
    if cursor is not None:
        position, length, cache_index = (column[: len(active)] for column in cursor[:3])
        following = cursor.cells(torch.where(active, length, 0))
        cache_index.copy_(torch.where(active, following, cache_index))
        position += active
        length += active


def accept_token(
    live: LiveSamples,
    records: Records,
    token: Tensor,
    logprob: Tensor,
    sampling_logprob: Tensor,
    automaton: ScoreAutomaton,
    end_ids: Tensor,
    stop_at_box: bool,
    cursor: Cursor | None = None,
    expected: Tensor | None = None,
) -> None:
    """Append to every live sample its next token, in place (see the module's docstring).

    token: (B,) int64; logprob, sampling_logprob: (B,) float32, as `sample_token` returns them.
    end_ids: (E,) int64. cursor: where the next tokens go; its first B rows advance. expected: (B,)
    float32, where the records have room for it and nowhere else. Slots are distinct, limits are at
    most M, and blocks are there: this is not checked, since that would wait for the device. Raises
    ValueError for other shapes and dtypes.
    """
    drawn = token, logprob, sampling_logprob, expected
    _check(live, records, drawn, end_ids, cursor)
    arguments = live, records, drawn, automaton, end_ids, stop_at_box, cursor
    if runs_triton(token):
        _run_triton(*arguments)
    elif runs_cpp(logprob, sampling_logprob):
        _run_cpp(*arguments)
    else:
        _run_torch(*arguments)


def _check(
    live: LiveSamples,
    records: Records,
    drawn: tuple[Tensor, Tensor, Tensor, Tensor | None],
    end_ids: Tensor,
    cursor: Cursor | None,
) -> None:
    batch = len(live.token)
    token, logprob, sampling_logprob, expected = drawn
    check("accept_token: token", token, (batch,), torch.int64)
    check("accept_token: logprob", logprob, (batch,), torch.float32)
    check("accept_token: sampling_logprob", sampling_logprob, (batch,), torch.float32)
    check("accept_token: records.tokens", records.tokens, "SM", torch.int64)
    shape = (2, *records.tokens.shape)
    check("accept_token: records.logprobs", records.logprobs, shape, torch.float32)
    if (expected is None) != (records.expected is None):
        raise ValueError("accept_token: expected scores and room for them go together")
    if expected is not None and records.expected is not None:
        check("accept_token: expected", expected, (batch,), torch.float32)
        check("accept_token: records.expected", records.expected, shape[1:], torch.float32)
    check("accept_token: end_ids", end_ids, "E", torch.int64)
    for name, value in live.tensors().items():
        dtype = torch.bool if name in ("finished", "ended") else torch.int64
        check(f"accept_token: live.{name}", value, (batch,), dtype)
    for column in cursor or ():
        ndim = 2 if cursor is not None and column is cursor.blocks else 1
        if column.ndim != ndim or len(column) < batch or column.dtype != torch.int64:
            raise ValueError(
                f"accept_token: a cursor must be (at least {batch},) int64, its blocks (at least "
                f"{batch}, J), got {tuple(column.shape)} {column.dtype}"
            )
    if cursor is not None and cursor.blocks.stride(1) != 1:
        raise ValueError(
            f"accept_token: rows of blocks must be contiguous, got {cursor.blocks.stride()}"
        )
