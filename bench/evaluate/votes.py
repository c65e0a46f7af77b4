"""Verdict lines -> arrays: what each sample of a row said, and what some of them come to.

k samples, n responses, S subsets of samples.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.evaluate.benchmark import RowScores
from kernels.vote import Rule, points_of

DECIMALS = 9  # of a mean


class RowVotes(NamedTuple):
    """What the samples of a row said, in the row's own order.

    scores: (k, n) float64, NaN for an invalid sample; where n = 1 the threshold is subtracted.
    expected: (k, n), the means of the distributions that scores were drawn from; None where the run
    did not read them. meta: (k,) float64, NaN without a meta score. first: (k,) int64, the response
    that was shown first. tokens: (k,) int64, generated. invalid: (k,) why a sample has no scores.
    row_tokens: of the prompts' tree. prompt_tokens: of all samples' prompts, none of them shared.
    error: why the row has no verdict, and then k = 0.
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


def read_votes(path: Path, threshold: float) -> Iterator[RowVotes]:
    """The lines of `engine.sample --out`."""
    with path.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            yield _of_line(line, threshold)


def _of_line(line: dict[str, Any], threshold: float) -> RowVotes:
    if "error" in line:
        none = np.zeros(0)
        return RowVotes(
            line["id"], none.reshape(0, 0), None, none, none.astype(int), none.astype(int), (), 0,
            0, None, line["error"],
        )  # fmt: skip
    samples = line["samples"]
    n = len(samples[0]["order"])
    shift = threshold if n == 1 else 0.0

    def table(name: str) -> np.ndarray:
        given = [each.get(name) or [np.nan] * n for each in samples]
        return np.array(given, dtype=np.float64) - shift

    metas = [np.nan if each["meta"] is None else each["meta"] for each in samples]
    return RowVotes(
        line["id"],
        table("scores"),
        table("expected") if any("expected" in each for each in samples) else None,
        np.array(metas, dtype=np.float64),
        np.array([each["order"][0] for each in samples]),
        np.array([each["tokens"] for each in samples]),
        tuple(each["invalid"] for each in samples),
        line["usage"]["tree_tokens"],
        line["usage"]["prompt_tokens"],
        line.get("row_meta"),
    )


def points(scores: np.ndarray, rule: Rule) -> np.ndarray:
    """(k, n) scores to the points that each sample counts for each response (kernels/vote.py)."""
    if rule == "sum" or scores.shape[1] == 1:
        return scores
    return np.array([each if np.isnan(each[0]) else points_of(each, rule) for each in scores])


def row_scores(points: np.ndarray, weights: np.ndarray, first: np.ndarray) -> RowScores:
    """The weighed means of points in S subsets.

    points: (k, n), NaN for an invalid sample. weights: (S, k) float64, 0 for samples that a subset
    does not hold or that its filter drops. first: (k,), the response that was shown first. Means
    are rounded, so that those that differ by the order of their sum alone are equal.
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
    orders = [means(counted * (first == shown)) for shown in range(2 if n == 2 else 0)]
    by_first = np.array(orders).reshape(len(orders), len(weights), n)
    return RowScores(means(counted), by_first)
