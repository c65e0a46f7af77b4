"""Scores that a head gives, real numbers -> the verdict of a row.

k samples, n responses. A sample holds a score for each response; they count as they are, and the
largest mean wins. Such scores have no range and no threshold: a single response has a score, and is
neither right nor wrong.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from engine.labels import agrees, is_correct
from engine.options import JudgeOptions, meaningless
from engine.request import Row
from engine.verdict import Sample, Verdict
from kernels.sample_token import stream_key, uniforms


def options_of(given: Mapping[str, Any], meaningful: Sequence[str]) -> JudgeOptions:
    """The options of `Judge.rows`, checked. Raises ValueError for one that has no meaning for the
    model, and is not as it is by default."""
    options = JudgeOptions(**given)
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in meaningful and value != field.default:
            raise meaningless(field.name, value)
    return options


def verdict_of(
    row: Row, key: str, samples: Sequence[Sample], seed: int, prompt_tokens: int, tree_tokens: int
) -> Verdict:
    """The verdict of samples that all have scores; a tie is drawn as `kernels/vote.py` draws it."""
    columns = zip(*(sample.scores or () for sample in samples), strict=True)
    totals = [math.fsum(column) for column in columns]
    means = [total / len(samples) for total in totals]
    tied = [response for response, total in enumerate(totals) if total == max(totals)]
    zero = torch.zeros(1, dtype=torch.int64)
    uniform = float(uniforms(torch.tensor([stream_key(seed, row.id, "tie")]), zero, zero)[0])
    best = tied[math.floor(uniform * len(tied))]
    return Verdict(
        id=row.id,
        key=key,
        best=best,
        scores=totals,
        mean_scores=means,
        tie=len(tied) > 1,
        k=len(samples),
        valid=len(samples),
        votes=len(samples),
        samples=list(samples),
        prompt_tokens=prompt_tokens,
        tree_tokens=tree_tokens,
        decode_tokens=sum(sample.tokens for sample in samples),
        score="head",
        label=row.label,
        correct=is_correct(best, means, row.label, math.nan) if len(totals) > 1 else None,
        agrees=agrees(best, row.label),
        row_meta=row.meta,
    )
