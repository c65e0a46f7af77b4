"""The expected score at the place where a sample writes a number in its box.

Dimension letters: B live samples, V vocabulary, C control states, E edges.

A judge draws one score where it has a whole distribution over scores. An *edge* is a token with
which a number in range may begin, or go on after a prefix; its value is the number so far, and it
is *open* where longer numbers go on from there (1 of 10, in tokens 1 and 0). At a place with the
prefix v the model could have written these numbers to the end with one token:

    closed edges from v, each with its probability and value;
    v itself, if in range: with what probability is left, no edge follows

The expected score is the mean of their values, by the model's own distribution. After an open edge
other numbers are possible, so there is none (NaN); the next token gives it. So over what may be
drawn its mean is that of the number drawn: it is the number's expectation, given its open edges.
No forward is needed: the logits are there, and the drawn token's log-prob normalises them.

Which of these is a score's, and what votes make of it, is elsewhere (`engine/expected.py`).
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import cpp
from kernels.checks import check
from kernels.cpp import runs_cpp
from kernels.device_math import tanh
from kernels.launch import launch, runs_triton
from kernels.score_grammar import BEGINS, CONTINUES, NEGATIVE

FIRST = -(2**62)  # the prefix of a number that begins
MINUS = FIRST + 1  # of one of which there is a sign
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NumberEdges(NamedTuple):
    """The edges (E,) of all numbers in range: prefix int64 (FIRST, MINUS or a number), token int64,
    value int64, and open, bool."""

    prefix: Tensor
    token: Tensor
    value: Tensor
    open: Tensor


def expected_score_ref(
    logits: Tensor,
    token: Tensor,
    logprob: Tensor,
    control: Tensor,
    value: Tensor,
    place: Tensor,
    edges: NumberEdges,
    low: int,
    high: int,
    softcap: float | None = None,
) -> Tensor:
    """The specification of `expected_score`, one sample at a time."""
    x = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    found = []
    for b in range(len(token)):
        at, drawn = int(place[control[b]]), int(token[b])
        if at == 0:
            found.append(math.nan)
            continue
        prefix = {BEGINS: FIRST, NEGATIVE: MINUS}.get(at, int(value[b]))
        here = edges.prefix == prefix
        tokens, values, opens = (each[here] for each in edges[1:])
        chances = torch.exp(x[b, tokens] - x[b, drawn] + logprob[b])
        goes_on = bool(len(tokens)) and at == CONTINUES and low <= prefix <= high
        if not (goes_on or (tokens == drawn).any()) or (opens & (tokens == drawn)).any():
            found.append(math.nan)
            continue
        rest = (1 - chances.sum()).clamp_min(0) if goes_on else chances.new_zeros(())
        mass = chances[~opens].sum() + rest
        total = (chances * values)[~opens].sum() + rest * (prefix if goes_on else 0)
        found.append(float(total / mass))
    return torch.tensor(found, dtype=logprob.dtype, device=logprob.device)


@triton.jit
def _expected_score_kernel(
    logits_ptr,  # (B, V)
    token_ptr,  # (B,) int64
    logprob_ptr,  # (B,) float32
    control_ptr,  # (B,) int64
    value_ptr,  # (B,) int64
    place_ptr,  # (C,) int64
    prefix_ptr,  # (E,) int64, as the next two
    edge_token_ptr,
    edge_value_ptr,
    open_ptr,  # (E,) bool
    num_edges,
    low,
    high,
    softcap,
    expected_ptr,  # (B,) float32
    vocab_size,
    BEGINNING: tl.constexpr,
    CONTINUING: tl.constexpr,
    UNBEGUN: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(place_ptr + tl.load(control_ptr + row))
    expected = float("nan")
    if at != 0:
        prefix = tl.load(value_ptr + row)
        goes_on = (at == CONTINUING) & (prefix >= low) & (prefix <= high)
        prefix = tl.where(at == BEGINNING, UNBEGUN, tl.where(at == CONTINUING, prefix, SIGNED))
        drawn = tl.load(token_ptr + row)
        logits_ptr += row * vocab_size
        shift = tl.load(logits_ptr + drawn).to(tl.float32)
        if softcap is not None:
            shift = softcap * tanh(shift / softcap)
        shift -= tl.load(logprob_ptr + row)
        zeros = tl.zeros((BLOCK,), tl.float32)
        every, closed, total = zeros, zeros, zeros
        edges_here, closed_drawn, open_drawn = zeros, zeros, zeros
        for start in range(0, num_edges, BLOCK):
            edge = start + tl.arange(0, BLOCK)
            mask = edge < num_edges
            mask &= tl.load(prefix_ptr + edge, mask=mask, other=0) == prefix
            token = tl.load(edge_token_ptr + edge, mask=mask, other=0)
            is_open = tl.load(open_ptr + edge, mask=mask, other=1) != 0
            value = tl.load(edge_value_ptr + edge, mask=mask, other=0).to(tl.float32)
            x = tl.load(logits_ptr + token, mask=mask, other=0.0).to(tl.float32)
            if softcap is not None:
                x = softcap * tanh(x / softcap)
            chance = tl.where(mask, tl.exp(x - shift), 0.0)
            every += chance
            closed += tl.where(is_open, 0.0, chance)
            total += tl.where(is_open, 0.0, chance * value)
            edges_here += mask.to(tl.float32)
            is_drawn = mask & (token == drawn)
            closed_drawn += (is_drawn & ~is_open).to(tl.float32)
            open_drawn += (is_drawn & is_open).to(tl.float32)
        goes_on = goes_on & (tl.sum(edges_here, 0) > 0)
        rest = tl.where(goes_on, tl.maximum(1.0 - tl.sum(every, 0), 0.0), 0.0)
        known = (goes_on | (tl.sum(closed_drawn, 0) > 0)) & (tl.sum(open_drawn, 0) == 0)
        mass = tl.where(known, tl.sum(closed, 0) + rest, 1.0)
        mean = (tl.sum(total, 0) + rest * prefix.to(tl.float32)) / mass
        expected = tl.where(known, mean, float("nan"))
    tl.store(expected_ptr + row, expected)


def _run_triton(*arguments: Any) -> Tensor:
    logits, token, logprob, control, value, place, edges, low, high, softcap = arguments
    expected = torch.empty_like(logprob)
    launch(
        _expected_score_kernel,
        (len(token),),
        logits, token, logprob, control, value, place, *edges, len(edges.token), low, high,
        softcap, expected, logits.shape[1],
        BEGINNING=BEGINS, CONTINUING=CONTINUES, UNBEGUN=FIRST, SIGNED=MINUS, BLOCK=128,
        num_warps=4,
    )  # fmt: skip
    return expected


def _run_cpp(*arguments: Any) -> Tensor:
    logits, token, logprob, control, value, place, edges, low, high, softcap = arguments
    expected = torch.empty_like(logprob)
    cpp.call(
        "expected_score", logits.dtype, logits, *logits.shape, token, logprob, control, value,
        place, *edges, len(edges.token), low, high, float(softcap or 0), FIRST, MINUS, expected,
    )  # fmt: skip
    return expected


def _run_torch(*arguments: Any) -> Tensor:
    logits, token, logprob, control, value, place, edges, low, high, softcap = arguments
    at = place[control]
    prefix = torch.where(at == CONTINUES, value, torch.where(at == BEGINS, FIRST, MINUS))
    here = (at > 0)[:, None] & (edges.prefix == prefix[:, None])  # (B, E)
    x = torch.cat([logits[:, edges.token], logits.gather(1, token[:, None])], 1).float()
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    chances = torch.where(here, (x[:, :-1] - x[:, -1:] + logprob[:, None]).exp(), 0)
    closed = torch.where(edges.open, 0, chances)
    goes_on = (at == CONTINUES) & (low <= value) & (value <= high) & here.any(1)
    rest = torch.where(goes_on, (1 - chances.sum(1)).clamp_min(0), 0)
    total = (closed * edges.value).sum(1) + rest * torch.where(goes_on, value, 0)
    drawn = here & (edges.token == token[:, None])
    known = (goes_on | drawn.any(1)) & ~(drawn & edges.open).any(1)
    return torch.where(known, total / (closed.sum(1) + rest), math.nan)


def expected_score(
    logits: Tensor,
    token: Tensor,
    logprob: Tensor,
    control: Tensor,
    value: Tensor,
    place: Tensor,
    edges: NumberEdges,
    low: int,
    high: int,
    softcap: float | None = None,
) -> Tensor:
    """(B,) float32: the expected score where each sample's token was drawn, NaN where it is none or
    depends on the next (see the module's docstring).

    logits (B, V) float32, bfloat16 or float16, contiguous, before the soft-cap; token (B,) int64
    and logprob (B,) float32 as `sample_token` returns them; control, value (B,) int64: the
    samples' `ScoreState` before the token; place (C,) int64 of the automaton; low, high: the range
    of scores. Token ids are not checked. Raises ValueError for other shapes and dtypes.
    """
    batch = len(token)
    if logits.dim() != 2 or logits.dtype not in _DTYPES or not logits.is_contiguous():
        raise ValueError(
            "expected_score: logits must be (B, V) float32, bfloat16 or float16, contiguous, got "
            f"{tuple(logits.shape)} {logits.dtype} with strides {logits.stride()}"
        )
    check("expected_score: token", token, (len(logits),), torch.int64)
    check("expected_score: logprob", logprob, (batch,), torch.float32)
    check("expected_score: control", control, (batch,), torch.int64)
    check("expected_score: value", value, (batch,), torch.int64)
    check("expected_score: place", place, "C", torch.int64)
    for name, each in zip(NumberEdges._fields, edges, strict=True):
        dtype = torch.bool if name == "open" else torch.int64
        check(f"expected_score: edges.{name}", each, (len(edges.token),), dtype)
    for each in (token, logprob, control, value, place, *edges):
        if not each.is_contiguous():
            raise ValueError(f"expected_score: all must be contiguous, got {each.stride()}")
    arguments = logits, token, logprob, control, value, place, edges, low, high, softcap
    if runs_triton(logits):
        return _run_triton(*arguments)
    if runs_cpp(logits):
        return _run_cpp(*arguments)
    return _run_torch(*arguments)
