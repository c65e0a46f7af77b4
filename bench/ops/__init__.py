"""Every operation's cases, described once for timings, ahead-of-time compilation and tests.

A module of this package describes one operation: functions that give an `OpCase` for a shape and
options; `CASES`, those that are timed on this machine's device; `variants`, all that a user's model
and options can lead to. `bench_ops.py` times all cases: `make bench`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.case import OpCase
from bench.ops import (
    accept_token,
    expected_score,
    forest_attention,
    gated_act,
    linear_logprob,
    matmul,
    merge_states,
    moe,
    norm_rope_write,
    rms_norm,
    rope,
    route,
    sample_token,
    segment_attention,
)
from bench.shapes import DECODE_ROWS, PREFILL_ROWS, Shape


@dataclass(frozen=True)
class Operation:
    """cases: timed on this machine. variants(shape, rows): every way to call it with this number of
    rows, in the shape's dtype. rows: the numbers that together lead to every launch."""

    cases: Sequence[OpCase]
    variants: Callable[[Shape, int], Iterator[OpCase]]
    rows: Sequence[int] = DECODE_ROWS + PREFILL_ROWS


# Live samples are padded for the model only: any number of them is drawn for.
_SAMPLES = (1, 33, 64, 128)

OPERATIONS = {
    "forest_attention": Operation(forest_attention.CASES, forest_attention.variants),
    "accept_token": Operation(accept_token.CASES, accept_token.variants, _SAMPLES),
    "expected_score": Operation(expected_score.CASES, expected_score.variants, _SAMPLES),
    "sample_token": Operation(sample_token.CASES, sample_token.variants, _SAMPLES),
    "segment_attention": Operation(
        segment_attention.CASES, segment_attention.variants, PREFILL_ROWS
    ),
    "linear_logprob": Operation(linear_logprob.CASES, linear_logprob.variants, (1, 2048)),
    "matmul": Operation(matmul.CASES, matmul.variants),
    "moe": Operation(moe.CASES, moe.variants),
    "route": Operation(route.CASES, route.variants),
    "merge_states": Operation(merge_states.CASES, merge_states.variants),
    "rms_norm": Operation(rms_norm.CASES, rms_norm.variants),
    "gated_act": Operation(gated_act.CASES, gated_act.variants),
    "rope": Operation(rope.CASES, rope.variants),
    "norm_rope_write": Operation(norm_rope_write.CASES, norm_rope_write.variants),
}
