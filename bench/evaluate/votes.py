"""Verdicts and their lines -> arrays: what each sample of a row said, and what some come to.

k samples, n responses, S subsets of samples.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from bench.evaluate.benchmark import RowScores
from engine.verdict import Sample, Verdict
from kernels.vote import Rule, points_of

DECIMALS = 9  # of a mean


class RowVotes(NamedTuple):
    """What the samples of a row said, in the row's own order.

    scores: (k, n) float64, NaN for an invalid sample; where n = 1 the threshold is subtracted,
    which scores of a head have not.
    expected: (k, n), the means of the distributions that scores were drawn from; None where the run
    did not read them. meta: (k,) float64, NaN without a meta score. first: (k,) int64, the response
    that was shown first, -1 where each was read by itself. tokens: (k,) int64, generated. invalid:
    (k,) why a sample has no scores. row_tokens: of the prompts' tree. prompt_tokens: of all
    samples' prompts, none of them shared. error: why the row has no verdict, and then k = 0.
    has_threshold: whether a response by itself is right or wrong by its score.
    """

    id: str
    scores: np.ndarray
    expected: np.ndarray | None
    meta: np.ndarray
    first: np.ndarray
    tokens: np.ndarray
    invalid: tuple[str | None, ...]
    row_tokens: int
    prompt_tokens: int
    facts: Any  # the row's `meta`
    error: str | None = None
    has_threshold: bool = True


class _Sample(msgspec.Struct):
    """What is read of a sample's fields in a line; `engine.verdict.Sample` has them too."""

    order: tuple[int, ...]
    scores: tuple[float, ...] | None
    invalid: str | None
    meta: float | None
    tokens: int
    expected: tuple[float, ...] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    tree_tokens: int


class _Line(msgspec.Struct):
    id: str
    samples: list[_Sample] = []
    usage: _Usage | None = None
    score: str = "drawn"
    row_meta: Any = None
    error: str | None = None


def read_votes(path: Path, threshold: float) -> Iterator[RowVotes]:
    """The lines of `engine.sample --out`. Raises ValueError for a line that is none."""
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            try:
                line = msgspec.json.decode(text, type=_Line)
            except msgspec.MsgspecError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            usage = line.usage
            if line.error is not None or usage is None:
                yield failed_row(line.id, line.error or "no verdict")
            else:
                yield _votes(
                    line.id, line.samples, usage.tree_tokens, usage.prompt_tokens, line.row_meta,
                    threshold if line.score != "head" else None,
                )  # fmt: skip


def votes_of(verdict: Verdict, threshold: float) -> RowVotes:
    """A verdict's own."""
    return _votes(
        verdict.id, verdict.samples, verdict.tree_tokens, verdict.prompt_tokens, verdict.row_meta,
        threshold if verdict.score != "head" else None,
    )  # fmt: skip


def failed_row(name: str, error: str) -> RowVotes:
    """Of a row without a verdict."""
    none = np.zeros(0)
    count = none.astype(int)
    return RowVotes(name, none.reshape(0, 0), None, none, count, count, (), 0, 0, None, error)


def _votes(
    name: str,
    samples: Sequence[_Sample] | Sequence[Sample],
    tree_tokens: int,
    prompt_tokens: int,
    facts: Any,
    threshold: float | None,
) -> RowVotes:
    """threshold: None for a scalar model, whose samples have no order either."""
    n = len(samples[0].order or samples[0].scores or ())
    shift = threshold if n == 1 and threshold is not None else 0.0

    def table(given: Iterable[Sequence[float] | None]) -> np.ndarray:
        rows = [[np.nan] * n if each is None else each for each in given]
        return np.array(rows, dtype=np.float64) - shift

    metas = [np.nan if each.meta is None else each.meta for each in samples]
    expected = [each.expected for each in samples]
    return RowVotes(
        name,
        table(each.scores for each in samples),
        None if all(each is None for each in expected) else table(expected),
        np.array(metas, dtype=np.float64),
        np.array([each.order[0] if each.order else -1 for each in samples]),
        np.array([each.tokens for each in samples]),
        tuple(each.invalid for each in samples),
        tree_tokens,
        prompt_tokens,
        facts,
        has_threshold=threshold is not None,
    )


def points(scores: np.ndarray, rule: Rule) -> np.ndarray:
    """(k, n) scores to the points that each sample counts for each response (kernels/vote.py)."""
    if rule == "sum" or scores.shape[1] == 1:
        return scores
    return np.array([each if np.isnan(each[0]) else points_of(each, rule) for each in scores])


def row_scores(
    points: np.ndarray, weights: np.ndarray, first: np.ndarray, drawn: np.ndarray | None = None
) -> RowScores:
    """The weighed means of points in S subsets.

    points: (k, n), NaN for an invalid sample. weights: (S, k) float64, 0 for samples that a subset
    does not hold or that its filter drops. first: (k,), the response that was shown first, -1 for a
    sample that says the same in any order. drawn: (S, k) bool, the samples of each subset, where a
    filter has dropped some: an order whose valid samples it has all dropped says what the others
    do. Means are rounded, so that those that differ by the order of their sum alone are equal.
    """
    valid = ~np.isnan(points[:, 0])
    filled = np.where(valid[:, None], points, 0.0)
    counted = weights * valid

    def means(weights: np.ndarray) -> np.ndarray:
        total = weights.sum(1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            found: np.ndarray = np.round((weights @ filled) / total, DECIMALS)
        return found

    n = points.shape[1]
    overall, orders = means(counted), []
    for shown in range(2 if n == 2 else 0):
        own = (first == shown) | (first < 0)
        found = means(counted * own)
        if drawn is not None:
            dropped = (drawn & valid & own).any(1) & ~(counted * own).any(1)
            found = np.where(dropped[:, None], overall, found)
        orders.append(found)
    return RowScores(overall, np.array(orders).reshape(len(orders), len(weights), n))
